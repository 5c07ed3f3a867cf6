"""Tool calls in what a model writes: read back in the form in which its chat template writes them.

The form is not listed by model family: a call is rendered, and what stands around its JSON is looked at.
Templates that write a call otherwise than as JSON with its name in it have none (`call_format` is None), and
what their models write stays text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.text.chat import Chat, Form
from luthier.text.structured_outputs import Structure, json_within

PROMPT = [{"role": "user", "content": "Hi"}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "probe_tool", "arguments": {"a": 1}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
ARGUMENTS = ("arguments", "parameters")  # what templates call them


@dataclass(frozen=True)
class CallFormat:
    """What stands before and after the JSON of a call, without the white space around it."""

    opening: str  # "": an answer is a call where it begins with JSON
    closing: str
    before: str = ""  # all that the template writes before the JSON of the probe, with its white space
    after: str = ""  # and after it, up to the end of the turn
    call: str = ""  # the JSON itself


def call_format(chat: Chat) -> CallFormat | None:
    """How a chat template writes calls; None where it writes none, or not as JSON with a name in it."""
    probe = chat.but()
    row = {"prompt": PROMPT, "tools": [TOOL]}
    for content, arguments in product(("as_is", "parts"), ("object", "text")):
        probe.form = Form(content, arguments)
        try:
            opening = probe.render(row, PROMPT, add_generation_prompt=True)
            turn = {"role": "assistant", "content": "", "tool_calls": [CALL]}
            whole = probe.render(row, [*PROMPT, turn])
        except BadRow:
            continue
        if not whole.startswith(opening):
            continue
        reply = whole[len(opening) :]
        for start in range(len(reply)):
            stop = json_end(reply, start)
            if stop is not None and any(calls_of(json.loads(reply[start:stop]))):
                # an empty <think></think> before a call is no part of it
                before = reply[:start].rpartition("</think>")[2]
                closing = without_end(chat, reply[stop:])
                after = reply[stop : reply.find(closing, stop) + len(closing)] if closing else ""
                return CallFormat(before.strip(), closing, before, after, reply[start:stop])
    return None


def forced_call(form: CallFormat, tools: Sequence[dict], tokenizer: Any) -> Structure:
    """One call of one of these tools, in a model's form, with arguments of the tool's schema. tools: in
    OpenAI's form. Raises RecipeError where the form has the arguments as text, not as JSON.
    """
    value = json.loads(form.call)
    several = isinstance(value, list)
    probe = value[0] if several else value
    schemas = [call_schema(probe, tool["function"]) for tool in tools]
    schema: dict[str, Any] = {"anyOf": schemas} if len(schemas) > 1 else schemas[0]
    if several:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    return json_within(form.before, schema, form.after, tokenizer)


def call_schema(probe: Any, function: dict) -> dict:
    """The JSON schema of what a probe's call would be with another function: its name, and any arguments that
    its parameters allow. Everything else is as in the probe.
    """
    if not isinstance(probe, dict):
        return {"const": probe}
    properties: dict[str, Any] = {}
    for key, value in probe.items():
        if key == "name":
            properties[key] = {"const": function["name"]}
        elif key in ARGUMENTS and isinstance(value, str):
            raise RecipeError("calls cannot be forced: this model's chat template writes arguments as text")
        elif key in ARGUMENTS:
            properties[key] = {"type": "object", **(function.get("parameters") or {})}
        elif key == "id":
            properties[key] = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
        else:
            properties[key] = call_schema(value, function)
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def without_end(chat: Chat, text: str) -> str:
    """What follows a call, without the special tokens that end the turn: a closing mark may be special, too,
    and is the first thing there.
    """
    text = text.strip()
    if chat.special is None:
        return text
    match = chat.special.search(text)
    if match and match.start() > 0:
        return text[: match.start()].strip()
    if match:
        return ""
    return text


def json_end(text: str, start: int) -> int | None:
    """Where the JSON object or list that begins here ends; None where none begins."""
    if text[start : start + 1] not in ("{", "["):
        return None
    try:
        _, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return stop


def calls_of(value: Any) -> Iterator[tuple[str, str]]:
    """(name, arguments as JSON text) of each call in a JSON value; none where it is no call."""
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict):
            continue
        call = call.get("function", call)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            continue
        for key in ARGUMENTS:
            if key in call:
                arguments = call[key]
                if not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                yield call["name"], arguments
                break


class CallReader:
    """Splits an answer, as it comes, into its text and its calls."""

    def __init__(self, form: CallFormat):
        self.form = form
        self.text = ""  # that is not certain yet: a call may begin in it, or has begun

    def add(self, text: str) -> str:
        """More of the answer: the text that is certainly no call."""
        self.text += text
        certain = self.call_start()
        plain, self.text = self.text[:certain], self.text[certain:]
        return plain

    def call_start(self) -> int:
        """Where in the text a call begins, or may begin when more of it comes."""
        opening = self.form.opening
        if not opening:
            begun = self.text.lstrip()
            return 0 if not begun or begun[0] in "{[" else len(self.text)
        place = self.text.find(opening)
        if place >= 0:
            return place
        for size in range(min(len(opening) - 1, len(self.text)), 0, -1):
            if self.text.endswith(opening[:size]):
                return len(self.text) - size
        return len(self.text)

    def end(self) -> tuple[str, list[tuple[str, str]]]:
        """The answer has ended: (the text that is left, the calls as name and arguments). What looks like a
        call and cannot be read stays text.
        """
        calls: list[tuple[str, str]] = []
        rest = self.text.lstrip()
        while rest:
            after = rest.removeprefix(self.form.opening).lstrip() if self.form.opening else rest
            stop = json_end(after, 0)
            read = list(calls_of(json.loads(after[:stop]))) if stop else []
            if not read:
                break
            calls += read
            rest = after[stop:].lstrip()
            if self.form.closing:
                rest = rest.removeprefix(self.form.closing).lstrip()
        if not calls:
            return self.text, []
        return rest, calls
