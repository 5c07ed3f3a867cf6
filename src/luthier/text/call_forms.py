"""The forms in which chat templates write tool calls, learned from what a template writes of a few of them:
JSON with the name in it (Qwen 2.5 and 3, Llama 3), the name before JSON of the arguments (gpt-oss, DeepSeek),
marks around each argument (Qwen 3.5, GLM 4.5, Nemotron), calls as in Python (LFM2).
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.text.structured_outputs import Until

ARGUMENTS = ("arguments", "parameters")  # what templates call them
NAME = r"[\w.:/-]+"
PYTHON = {"True": True, "False": False, "None": None}  # as templates in Python write them

Call = tuple[str, str]  # (name, arguments as JSON text)


@dataclass(frozen=True)
class CallForm:
    """What stands around a call. opening: what it begins with; "" where an answer is a call when it begins
    with a bracket. closing: what follows the last call, without the special tokens that end the turn.
    """

    opening: str
    closing: str

    def read(self, text: str, tools: Mapping[str, dict]) -> tuple[list[Call], str] | None:
        """(the calls at the beginning of a text, what follows them); None where there is none.

        tools: name -> JSON schema of its parameters, which tells a text from a number where the form does
            not.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class JsonCalls(CallForm):
    """{"name": ..., "arguments": {...}}, or a list of them, between two marks."""

    before: str = ""  # all that the template writes before the JSON of the probe, with its white space
    after: str = ""  # and after it, up to the end of the turn
    call: str = ""  # the JSON itself

    def read(self, text, tools):
        after = text.removeprefix(self.opening).lstrip() if self.opening else text
        stop = json_end(after, 0)
        calls = list(calls_of(json.loads(after[:stop]))) if stop else []
        if not calls:
            return None
        rest = after[stop:].lstrip()
        if self.closing:
            rest = rest.removeprefix(self.closing).lstrip()
        return calls, rest


@dataclass(frozen=True)
class WrittenCalls(CallForm):
    """A name and its arguments between texts that are the same for every call.

    head: what stands before the name of the first call. end: behind the arguments of each. following: between
    that and the next name; None where a turn has one call.
    """

    head: str
    middle: str  # between a name and its arguments
    end: str
    following: str | None

    def read(self, text, tools):
        start, rest = after(self.head, text), text
        calls: list[Call] = []
        while start is not None and (name := re.match(rf"\s*({NAME})", start)):
            body = after(self.middle, start[name.end() :])
            one = None if body is None else self.arguments(body, tools.get(name[1], {}))
            if one is None:
                break
            arguments, rest = one
            calls.append((name[1], arguments))
            start = None if self.following is None else after(self.following, rest)
        if not calls:
            return None
        behind = after(self.closing, rest)
        return calls, (rest if behind is None else behind).lstrip()

    def arguments(self, text: str, schema: Mapping[str, Any]) -> tuple[str, str] | None:
        """(the arguments that a text begins with as JSON, what follows the call)"""
        raise NotImplementedError

    def parts(self, function: Mapping[str, Any]) -> list[Any]:
        """A call of a function, whatever its arguments, as `structured_outputs.one_of` takes it."""
        parameters = {"type": "object", **(function.get("parameters") or {})}
        return [self.head + function["name"] + self.middle, *self.values(parameters), self.end]

    def values(self, parameters: Mapping[str, Any]) -> list[Any]:
        """The arguments of a function with parameters of this JSON schema, in the same form."""
        raise NotImplementedError


@dataclass(frozen=True)
class NamedJson(WrittenCalls):
    """The name, a text, and the arguments as JSON."""

    def arguments(self, text, schema):
        stop = json_end(text, 0)
        rest = None if stop is None else after(self.end, text[stop:])
        return None if rest is None else (text[:stop], rest)

    def values(self, parameters):
        return [parameters]


@dataclass(frozen=True)
class MarkedArguments(WrittenCalls):
    """The name, and for each argument its own name and value between marks. Texts stand as they are, all else
    as JSON.
    """

    before: str  # before the name of an argument
    between: str  # between its name and its value
    behind: str  # behind its value

    def arguments(self, text, schema):
        argument = f"{spaced(self.before)}({NAME}){lined(self.between)}(.*?){lined(self.behind)}"
        types = schema.get("properties", {})
        values: dict[str, Any] = {}
        while one := re.match(argument, text, re.DOTALL):
            values[one[1]] = value_of(one[2], types.get(one[1]))
            text = text[one.end() :]
        rest = after(self.end, text)
        return None if rest is None else (json.dumps(values, ensure_ascii=False), rest)

    def values(self, parameters):
        required = parameters.get("required", ())
        parts: list[Any] = []
        for name, schema in parameters.get("properties", {}).items():
            value = [{"$defs": parameters.get("$defs", {}), **schema}, self.behind]
            if schema.get("type") == "string":  # any text, also where the schema lists some
                value = [Until(self.behind)]
            argument = [self.before + name + self.between, *value]
            parts += argument if name in required else [argument]
        return parts


@dataclass(frozen=True)
class PythonCalls(CallForm):
    """[name(argument='text', other=1), name()], between two marks."""

    def read(self, text, tools):
        text = text.removeprefix(self.opening).lstrip()
        stop = list_end(text)
        if stop is None:
            return None
        # templates write line breaks within quotes as they are, which Python does not
        calls = python_calls(text[:stop]) or python_calls(text[:stop].replace("\n", "\\n"))
        if not calls:
            return None
        return calls, text[stop:].lstrip().removeprefix(self.closing).lstrip()


# ---------------------------------------------------------------------------------------------- reading


def json_end(text: str, start: int) -> int | None:
    """Where the JSON object or list that begins here ends; None where none begins."""
    if text[start : start + 1] not in ("{", "["):
        return None
    try:
        _, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return stop


# a text in quotes, or a bracket
PYTHON_PART = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[\[\](){}]""", re.DOTALL)


def list_end(text: str) -> int | None:
    """Where the Python list that a text begins with ends; None where none begins, or it does not end."""
    if not text.startswith("["):
        return None
    depth = 0
    for part in PYTHON_PART.finditer(text):
        depth += (part[0] in "[({") - (part[0] in "])}")
        if depth == 0:
            return part.end()
    return None


def calls_of(value: Any) -> Iterator[Call]:
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


def python_calls(text: str) -> list[Call]:
    """The calls of a list in Python whose arguments are literals; none where it is another text."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else []:
        if not isinstance(node, ast.Call) or node.args:
            return []
        try:
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            calls.append((ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)))
        except (ValueError, TypeError):
            return []
    return calls


def value_of(text: str, schema: Any) -> Any:
    """What an argument's text means: a text where its schema says so, else JSON if it is JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    if text.strip() in PYTHON:
        return PYTHON[text.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def after(literal: str, text: str) -> str | None:
    """What follows a literal at the beginning of a text, whatever its white space; None where it is not
    there.
    """
    begun = re.match(r"\s*" + spaced(literal), text)
    return text[begun.end() :] if begun else None


def spaced(literal: str) -> str:
    """A pattern of a text in which white space may be more or less."""
    return r"\s*".join(map(re.escape, re.split(r"\s+", literal)))


def lined(literal: str) -> str:
    """A pattern of a text beside a value, whose own white space counts: line breaks may be left out."""
    return "\n?".join(map(re.escape, literal.split("\n")))


# ---------------------------------------------------------------------------------------------- learning


def learn(one: str, two: str | None, names: Sequence[str], words: Sequence[str]) -> CallForm | None:
    """The form of what a template writes of one call, and of two.

    Args:
        one: a call of names[0], up to the end of the turn.
        two: the same call and one of names[1] after it; None where a turn has one call.
        words: of the first call, the name of an argument, its text, and both of another one.

    Returns:
        None where the words do not stand there once each, in this order.
    """
    words = (names[0], *words)
    places = [one.find(word) for word in words]
    if min(places) < 0 or places != sorted(places):
        return None
    texts, end = [], 0  # what stands before each word
    for word, place in zip(words, places, strict=True):
        texts.append(one[end:place])
        end = place + len(word)
    head, middle, between, next_argument, between_again = texts
    opening = head.split()[0] if head.strip() else ""
    if middle == "(" and head.endswith("["):
        return PythonCalls(head[:-1].strip(), one[one.rindex("]") + 1 :].strip())
    brace = one.find("{", places[0], places[1])
    stop = json_end(one, brace) if brace >= 0 else None
    if stop is not None:
        ending, following, closing = endings(one[stop:], second(two, one[:stop], names[1]))
        return NamedJson(opening, closing, head, middle[: middle.index("{")], ending, following)
    before = common_suffix(middle, next_argument)
    behind = next_argument.removesuffix(before)
    if between != between_again or not before or not behind or not one.startswith(behind, end):
        return None
    stop = end + len(behind)
    ending, following, closing = endings(one[stop:], second(two, one[:stop], names[1]))
    middle = middle.removesuffix(before)
    return MarkedArguments(opening, closing, head, middle, ending, following, before, between, behind)


def second(two: str | None, first: str, name: str) -> str | None:
    """What stands between a call and the name of the next one; None where there is none."""
    if two is None or not two.startswith(first) or name not in two:
        return None
    return two[len(first) : two.index(name)]


def endings(last: str, inner: str | None) -> tuple[str, str | None, str]:
    """(what ends every call, what leads to the next one, what follows the last one), of what stands behind
    the last call and behind one that another follows.
    """
    if inner is None:
        return "", None, last.strip()
    size = len(os.path.commonprefix([last, inner]))
    return last[:size], inner[size:].strip(), last[size:].strip()


def common_suffix(a: str, b: str) -> str:
    """The longest text that both end with."""
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]
