"""Whether all that a row means was written by the chat template.

A chat template is a program that writes what its author thought of and drops the rest without a word: tool
calls, reasoning, a system prompt, the text beside a call. What was dropped would not be learned, and the
model would learn to answer without it; so every piece is looked for in what was rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from luthier.methods.formats._base import BadRow, text_of_parts
from luthier.text.chat import MARK, all_text, reasoning_of, split_thoughts
from luthier.text.turns import Span, is_supervised

MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # columns of what a text model cannot read
THINK = re.compile(r"</?think>")


class Lost(BadRow):
    """The rendered text lacks a part of the row. `part`: which, in the words of the advice."""

    def __init__(self, part: str, reason: str):
        super().__init__(reason)
        self.part = part


class Empty(Lost):
    """A turn that says nothing; the message says what else it has."""


def check_media(row: dict) -> None:
    """Raise Lost where a row has images, video or sound, which no text model reads."""
    for turn in row["prompt"] if isinstance(row["prompt"], list) else ():
        content = turn.get("content")
        if isinstance(content, list) and not all_text(content):
            kinds = sorted({str(part.get("type")) for part in content} - {"text"})
            words = " and ".join(f"{kind}s" for kind in kinds)
            listed = ", ".join(kinds)
            raise Lost("media", f"{words} are not read by this model (parts of type {listed})")
    for name in MEDIA:
        value = row.get(name)
        if not value or isinstance(value, (str, int, float)):
            continue
        raise Lost(name, f"{name} are not read by this model")


def check_rendered(row: dict, turns: list[dict], first: int, whole: str, spans: list[Span]) -> None:
    """Raise Lost where a piece of a row is not in `whole`, its rendered conversation.

    first: the turn that learning begins with. spans: of the supervised turns from there on; what they say
    must stand within them, what other turns say anywhere after the turn before.
    """
    check_tools(row, whole)
    supervised = iter(spans)
    position = 0
    for i, turn in enumerate(turns):
        learned = i >= first and is_supervised(turn)
        anywhere = turn["role"] in ("system", "developer")  # some templates move it to a later turn
        if learned:
            start, stop = next(supervised)
            text = whole[start:stop]
        elif anywhere:
            start, text = 0, whole
        else:
            start, text = position, whole[position:]
        try:
            end = start + check_turn(turn, text, learned)
        except Empty as why:
            raise Lost(why.part, f"turn {i + 1} of messages ({turn['role']}) is empty{why}") from None
        if not anywhere:
            position = max(position, end)


def check_turn(turn: dict, text: str, learned: bool) -> int:
    """Where in `text` the last piece of a turn ends. Raises Lost where a piece is not there."""
    if MARK in text:
        text = text.replace(MARK, "")
    role, end, pieces = turn["role"], 0, 0
    for what, piece in pieces_of(turn, learned):
        pieces += 1
        place = place_of(piece, text)
        if place < 0 and what == "refusal":
            raise Empty(what, ", and the chat template does not write its refusal")
        if place < 0:
            raise Lost(what, f"the chat template does not write {WORDS[what].format(role=role)}")
        end = max(end, place + len(piece))
    for call in turn.get("tool_calls", ()):
        pieces += 1
        check_call(call["function"], text, bool(text_of_parts(turn["content"]).strip()))
    content = turn.get("content")
    if isinstance(content, list) and any(repr(part) in text or json.dumps(part) in text for part in content):
        raise Lost("parts", f"the chat template takes text, and the content of {role} turns is parts")
    if learned and not pieces:
        raise Empty("empty", "")
    return end


WORDS = {
    "text": "the text of {role} turns",
    "text beside a call": "the text beside the tool calls of {role} turns",
    "reasoning": "the reasoning of {role} turns (reasoning_content)",
}


def pieces_of(turn: dict, learned: bool) -> Iterator[tuple[str, str]]:
    """(what it is, text) of a turn's text and reasoning. Of turns that are not learned the reasoning is left
    out: most templates drop it once later turns follow.
    """
    content = turn.get("content") or ""
    if turn["role"] != "assistant":
        if isinstance(content, str):
            yield "text", content.strip()
        else:
            for part in content:
                yield "text", str(part.get("text", "")).strip()
        return
    if isinstance(content, str) and content and "think>" not in content and not reasoning_of(turn):
        reasoning, answer = "", content
    else:
        reasoning, answer = split_thoughts(turn)
    if learned and reasoning:
        yield "reasoning", reasoning.strip()
    what = "text beside a call" if turn.get("tool_calls") else "text"
    for piece in THINK.split(answer):
        if piece.strip():
            yield what, piece.strip()
    if turn.get("refusal") and not answer.strip():
        yield "refusal", str(turn["refusal"]).strip()


def place_of(piece: str, text: str) -> int:
    """Where a piece stands in a text, as it is or as JSON writes it; -1 where it does not."""
    place = text.find(piece)
    if place < 0:
        place = text.find(json.dumps(piece, ensure_ascii=False)[1:-1])
    if place < 0:
        place = text.find(json.dumps(piece)[1:-1])
    return place


def check_call(function: dict, text: str, beside: bool) -> None:
    """Raise Lost where a tool call's name or one of its arguments is not in a text. beside: the turn has text
    of its own.
    """
    arguments = function["arguments"]
    values = [function["name"], *leaves(arguments)]
    if not all(any(form in text for form in written_forms(value)) for value in values):
        if beside:
            raise Lost(
                "tool calls", "the chat template writes a turn's text, but not its tool calls beside it"
            )
        raise Lost("tool calls", "the chat template does not write tool calls")
    python = repr(arguments)
    if isinstance(arguments, dict) and python in text and python != json.dumps(arguments, ensure_ascii=False):
        raise Lost("tool calls", "the chat template writes the arguments of tool calls as Python, not JSON")


def leaves(value: Any) -> Iterator[Any]:
    """The keys and the values that are no collections, at any depth."""
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def written_forms(value: Any) -> list[str]:
    """How a value may be written."""
    if isinstance(value, str):
        return [value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]
    return [json.dumps(value, default=str), str(value)]


def check_tools(row: dict, whole: str) -> None:
    """Raise Lost where the name, the description or a parameter of a declared tool is not in a text."""
    for declaration in row.get("tools") or ():
        function = declaration.get("function")
        if not isinstance(function, dict):
            continue
        words = [function.get("name"), function.get("description")]
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            words += parameters["properties"]
        for word in words:
            if isinstance(word, str) and place_of(word.strip(), whole) < 0:
                raise Lost("tools", "the chat template does not write the tools that a row declares")
