"""Turns through a tokenizer's chat template, in the form that the template takes them.

Model families want one message in different forms: content as text or as parts, a call's arguments as an
object or as JSON text, reasoning under one key or another. `Chat` renders in one form at a time; which of
them loses nothing is found out in encode.py, by trying (verify.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime
from functools import lru_cache
from itertools import product
from typing import Any

from luthier.errors import RecipeError, shortened
from luthier.methods.formats._base import REASONING, BadRow, text_of_parts
from luthier.text.template_limits import TemplateLimit, limited
from luthier.text.templates import marks_generation, names_read, switches, template_text

TURN_WEIGHTS = ("loss", "loss_scale")  # keys of a turn that are ours: templates must not see them
# Put twice into a special token that a message holds as text (after its first character and at its end), so
# that the tokenizer does not read it as one. No text holds it: Unicode keeps it free of characters.
MARK = "\ufdd0"
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
MAX_STOPPED = 3  # renderings that go over the limits, until the template is refused
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Form:
    """How turns are handed to a template."""

    content: str = "as_is"  # "text": parts joined; "parts": text wrapped into a part
    arguments: str = "object"  # "text": as JSON text


class Chat:
    """A tokenizer's chat template, with what it is rendered with.

    options: `chat_template_kwargs` of the recipe; a row's own go before them. today: the date that a template
    prints as today's. split_special: special tokens in messages that are not the assistant's stay text.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: dict[str, Any] | None = None,
        today: str | None = None,
        split_special: bool = True,
    ):
        self.tokenizer, self.options, self.split_special = tokenizer, dict(options or {}), split_special
        self.today = today or Date.today().isoformat()
        self.template: str | None = None  # another one than the tokenizer's, to try it
        self.form = Form()
        self.special = special_pattern(tokenizer)
        self.typed: dict[str, None] = {}  # special tokens in the messages of others than the assistant
        self.stopped: Counter[str] = Counter()  # how often a template went over its limits, by its text

    @property
    def text(self) -> str:
        """The template's text."""
        return self.template or template_text(self.tokenizer)

    @property
    def reads_clock(self) -> bool:
        """Whether the template prints today's date."""
        return "strftime_now" in self.text

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks what the assistant writes with {% generation %}."""
        return marks_generation(self.text)

    @property
    def switches(self) -> tuple[str, ...]:
        """The variables that `chat_template_kwargs` may set."""
        return switches(self.text)

    def but(self, template: str | None = None, options: dict[str, Any] | None = None) -> Chat:
        """The same with another template, or with further options."""
        other = Chat(self.tokenizer, {**self.options, **(options or {})}, self.today, self.split_special)
        other.template, other.stopped = template or self.template, self.stopped
        return other

    # ------------------------------------------------------------------------------------------ rendering

    def render(self, row: dict, turns: list[dict], add_generation_prompt: bool = False) -> str:
        """Turns as the template writes them, with the row's tools. Raises BadRow where it refuses them."""
        return self.call(row, turns, add_generation_prompt=add_generation_prompt, tokenize=False)

    def generated(self, row: dict, turns: list[dict]) -> list[tuple[int, int]]:
        """The characters [start, end) of each token that the template marks with {% generation %}."""
        encoding = self.call(
            row,
            turns,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marked = []
        for offset, mask in zip(encoding["offset_mapping"], encoding["assistant_masks"], strict=True):
            if mask:
                marked.append(offset)
        return marked

    def call(self, row: dict, turns: list[dict], **how: Any) -> Any:
        """`apply_chat_template` with all that a row and the recipe say, within limits. Raises BadRow where
        the template refuses or goes over them, and RecipeError where it has often gone over them: the
        template is what is wrong then.
        """
        options = {**self.options, **(row.get("chat_template_kwargs") or {})}
        try:
            if self.template is not None or self.reads_clock:
                text = self.template or self.tokenizer.get_chat_template(None, row.get("tools"))
                options["chat_template"] = dated(text, self.today)
            with limited(turns):
                return self.tokenizer.apply_chat_template(
                    [self.turn(turn) for turn in turns], tools=row.get("tools"), **how, **options
                )
        except TemplateLimit as why:
            self.stopped[self.text] += 1
            sentence = f"the chat template was stopped, since it takes {why} for a row"
            if self.stopped[self.text] >= MAX_STOPPED:
                raise RecipeError(f"{sentence}; set another chat_template", "chat_template") from None
            raise BadRow(sentence) from None
        except Exception as why:  # a template is somebody's program: it may raise anything
            reason = shortened(str(why), 300) or type(why).__name__
            raise BadRow(f"the chat template raised an error: {reason}") from None

    # ------------------------------------------------------------------------------------------ one turn

    def turn(self, turn: dict) -> dict:
        """A turn as the template takes it."""
        handed = {key: value for key, value in turn.items() if key not in TURN_WEIGHTS}
        content = handed.get("content")
        if self.form.content == "text" and isinstance(content, list) and all_text(content):
            content = text_of_parts(content)
        elif self.form.content == "parts" and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        handed["content"] = self.marked(content, turn["role"])
        if handed.get("tool_calls") and self.form.arguments == "text":
            handed["tool_calls"] = list(map(with_text_arguments, handed["tool_calls"]))
        if turn["role"] == "assistant":
            self.place_reasoning(handed)
        return handed

    def place_reasoning(self, turn: dict) -> None:
        """Put an assistant turn's reasoning under the keys that the template reads; where it reads none, but
        knows <think>, before the content.
        """
        reasoning = reasoning_of(turn)
        if not reasoning:
            return
        read = [name for name in REASONING if name in names_read(self.text)]
        for name in read:
            turn[name] = reasoning
        if not read and "think>" in self.text and isinstance(turn["content"], str):
            turn["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"

    def marked(self, content: Any, role: str) -> Any:
        """Content in which special tokens are kept as text (MARK); the assistant's stays, but for an end of
        turn that the template writes itself.
        """
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    part = {**part, "text": self.marked(part["text"], role)}
                parts.append(part)
            return parts
        if not isinstance(content, str) or self.special is None or not self.special.search(content):
            return content
        if role == "assistant":
            return self.without_end(content)
        self.typed |= dict.fromkeys(self.special.findall(content))
        if not self.split_special:
            return content
        return self.special.sub(lambda match: match[0][0] + MARK + match[0][1:] + MARK, content)

    def without_end(self, content: str) -> str:
        """An assistant's text without the end of turn that the template puts there anyhow."""
        ends = [self.tokenizer.eos_token]
        ends += [token for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if token in self.text]
        for end in filter(None, ends):
            if content.rstrip().endswith(end):
                return content.rstrip().removesuffix(end)
        return content


@lru_cache(maxsize=32)
def dated(template: str, today: str) -> str:
    """A template in which today's date is written out, wherever it asks for the date in a fixed format."""
    day = datetime.fromisoformat(today)
    return CLOCK.sub(lambda match: json.dumps(day.strftime(match[2]), ensure_ascii=False), template)


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds a tokenizer's special tokens in a text; None where it has none."""
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            tokens.add(token.content)
    if not tokens:
        return None
    # longer ones first: one may begin with another
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def all_text(content: list) -> bool:
    """Whether all parts of a content are text."""
    return all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content)


def with_text_arguments(call: dict) -> dict:
    """A tool call whose arguments are JSON text."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def reasoning_of(turn: dict) -> str:
    """A turn's reasoning, under whichever key it lies; "" where there is none."""
    for name in REASONING:
        if isinstance(turn.get(name), str) and turn[name].strip():
            return turn[name]
    return ""


def split_thoughts(turn: dict) -> tuple[str, str]:
    """(reasoning, answer) of an assistant turn: the reasoning is a key of its own, or lies between <think>
    and </think> at the beginning of its text.
    """
    content = text_of_parts(turn.get("content") or "")
    reasoning = reasoning_of(turn)
    match = THOUGHTS.match(content)
    if match and not reasoning:
        return match[1].strip(), match[2]
    return reasoning, content


def other_forms(row: dict, former: Form) -> list[Form]:
    """The forms but `former` in which a row's turns may be handed over."""
    turns = [turn for turn in row["prompt"] if isinstance(turn, dict)]
    for completion in row.get("completions", ()):
        turns += [turn for turn in completion if isinstance(turn, dict)]
    contents, arguments = ["as_is", "parts"], ["object"]
    for turn in turns:
        if isinstance(turn.get("content"), list):
            contents = ["as_is", "text", "parts"]
        if turn.get("tool_calls"):
            arguments = ["object", "text"]
    forms = [Form(content, argument) for content, argument in product(contents, arguments)]
    return [form for form in forms if form != former]
