"""Tool calls in what a model writes: read back in the form in which its chat template writes them.

The form is not listed by model family: calls are rendered, and what stands around their names and arguments
is looked at (call_forms.py). A form counts where a call with a number and a list is read back as it was; of
other templates `call_format` is None, and what their models write stays text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.text.call_forms import ARGUMENTS, CallForm, JsonCalls, WrittenCalls, calls_of, json_end, learn
from luthier.text.chat import Chat, Form
from luthier.text.structured_outputs import Structure, json_within, one_of

PROMPT = [{"role": "user", "content": "Hi"}]
NAMES = ("probe_tool", "other_tool")
WORDS = ("first_key", "first text", "second_key", "second text")
TEXTS = {WORDS[0]: WORDS[1], WORDS[2]: WORDS[3]}
MIXED = {"first_key": 12, "second_key": 'a text, "with" marks\nand lines', "third_key": [1, {"a": "}"}]}


def call_format(chat: Chat) -> CallForm | None:
    """How a chat template writes calls; None where it writes none, or in no form that can be read back."""
    probe = chat.but()
    for content, arguments in product(("as_is", "parts"), ("object", "text")):
        probe.form = Form(content, arguments)
        form = json_calls(probe) or other_calls(probe)
        if form is not None and reads(form, probe):
            return form
    return None


def written(chat: Chat, *calls: tuple[str, dict]) -> str | None:
    """What a template writes of a turn of calls, without an empty <think></think> before them; None where it
    writes no such turn.
    """
    turns = []
    for i, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": arguments}
        turns.append({"id": f"call0000{i + 1}", "type": "function", "function": function})
    row = {"prompt": PROMPT, "tools": [probe_tool(name) for name in NAMES]}
    try:
        opening = chat.render(row, PROMPT, add_generation_prompt=True)
        whole = chat.render(row, [*PROMPT, {"role": "assistant", "content": "", "tool_calls": turns}])
    except BadRow:
        return None
    # a template may open <think> where it asks for an answer, and close it at once where there is one
    if opening.rstrip().endswith("<think>"):
        opening = opening.rstrip().removesuffix("<think>")
    return whole[len(opening) :].rpartition("</think>")[2] if whole.startswith(opening) else None


def probe_tool(name: str) -> dict:
    """A tool of whose parameters nothing is said."""
    parameters = {"type": "object", "properties": {key: {} for key in MIXED}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def json_calls(chat: Chat) -> CallForm | None:
    """The form of templates that write JSON with a name in it."""
    reply = written(chat, (NAMES[0], {"a": 1})) or ""
    for start in range(len(reply)):
        stop = json_end(reply, start)
        if stop is not None and any(calls_of(json.loads(reply[start:stop]))):
            before, closing = reply[:start], without_end(chat, reply[stop:])
            after = reply[stop : reply.find(closing, stop) + len(closing)] if closing else ""
            return JsonCalls(before.strip(), closing, before, after, reply[start:stop])
    return None


def other_calls(chat: Chat) -> CallForm | None:
    """The form of other templates."""
    one = written(chat, (NAMES[0], TEXTS))
    if one is None:
        return None
    two = written(chat, (NAMES[0], TEXTS), (NAMES[1], TEXTS))
    last = one.rfind(WORDS[3]) + len(WORDS[3])
    end = without_end(chat, one[last:])
    return learn(one[: one.find(end, last) + len(end)], two, NAMES, WORDS)


def reads(form: CallForm, chat: Chat) -> bool:
    """Whether a form reads back what a template writes of other calls."""
    calls = [(NAMES[1], MIXED), (NAMES[0], TEXTS)]
    for some in (calls, calls[:1]):
        reader = CallReader(form)
        reader.add(written(chat, *some) or "")
        _, result = reader.end()
        if [(name, json.loads(arguments)) for name, arguments in result] == some:
            return True
    return False


def forced_call(form: CallForm, tools: Sequence[dict], tokenizer: Any) -> Structure:
    """One call of one of these tools, in a model's form, with arguments of the tool's schema. tools: in
    OpenAI's form. Raises RecipeError where the form has the arguments as text, or writes calls as Python.
    """
    if isinstance(form, WrittenCalls):
        return one_of([form.parts(tool["function"]) for tool in tools], tokenizer)
    if not isinstance(form, JsonCalls):
        raise RecipeError("calls cannot be forced: this model's chat template writes them as Python")
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


class CallReader:
    """Splits an answer, as it comes, into its text and its calls."""

    def __init__(self, form: CallForm, tools: Sequence[Mapping[str, Any]] = ()):
        """tools: in OpenAI's form, whose schemas tell a text from a number where the form does not."""
        self.form = form
        functions = [tool.get("function", tool) for tool in tools]
        self.schemas = {f.get("name"): f.get("parameters") or {} for f in functions}
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
        while rest and (read := self.form.read(rest, self.schemas)):
            more, rest = read
            calls += more
        return (rest, calls) if calls else (self.text, [])
