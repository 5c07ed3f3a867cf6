"""What to do about rows that a chat template cannot write: only what was tried and works is advised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import REASONING, BadRow
from luthier.text.templates import TEMPLATES, builtin_template
from luthier.text.verify import MEDIA, Lost

if TYPE_CHECKING:
    from luthier.text.encode import Renderer

MOST_SWITCHES = 6  # of a template that are tried


def advice(renderer: Renderer, problem: BadRow, row: dict) -> str:
    """A sentence that says how rows such as this one can be used; "" where nothing was found to help."""
    words = []
    remedy = ""
    if not (isinstance(problem, Lost) and problem.part in ("media", *MEDIA)):
        remedy = working_remedy(renderer, row)
    if remedy:
        words.append(f"set {remedy}")
    if isinstance(problem, Lost):
        without = leave_out(problem.part, row)
        if without:
            words.append(without)
    return ", or ".join(words)


def working_remedy(renderer: Renderer, row: dict) -> str:
    """The first setting under which the row can be used; "" where there is none."""
    switch = working_switch(renderer, row)
    if switch:
        return switch
    for name in ("chatml", "plain"):
        if name not in TEMPLATES:
            continue
        starts_with_bos = renderer.prefix[:1] == [renderer.tokenizer.bos_token_id]
        try:
            template = builtin_template(renderer.tokenizer, name, starts_with_bos)
        except RecipeError:  # the tokenizer lacks its special tokens
            continue
        if works(renderer, row, template=template):
            return f"chat_template: {name}"
    return ""


def working_switch(renderer: Renderer, row: dict) -> str:
    """As `working_remedy`, of the template's own switches."""
    for name in renderer.chat.switches[:MOST_SWITCHES]:
        for value in (False, True):
            if works(renderer, row, options={name: value}):
                return f"chat_template_kwargs: {{{name}: {str(value).lower()}}}"
    return ""


def works(renderer: Renderer, row: dict, **changes: Any) -> bool:
    """Whether a row can be used with another template, or further options of it."""
    other = copy.copy(renderer)
    other.chat = renderer.chat.but(**changes)
    other.advice, other.empty_thoughts = Silent(), None
    try:
        encoded = other.encode_structured(row)
    except BadRow:
        return False
    return all(map(any, encoded.supervised))


class Silent(dict):
    """In the place of advice while advice is looked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return ""


def leave_out(part: str, row: dict) -> str:
    """How to train without what is lost, under its name in the file."""
    if part in ("tools", *MEDIA):
        return f"to train without them: columns: {{unread_{part}: {part}}}"
    if part == "refusal":
        return "to train on it as text: tags: {refusal: content}"
    if part == "reasoning":
        for turn in turns_of(row):
            for name in REASONING:
                if turn.get(name):
                    return f"to train without it: tags: {{{name}: unread}}"
    return ""


def turns_of(row: dict) -> list[dict]:
    """All turns of a row."""
    turns = [turn for turn in row["prompt"] if isinstance(turn, dict)]
    for completion in row.get("completions", ()):
        turns += [turn for turn in completion if isinstance(turn, dict)]
    return turns
