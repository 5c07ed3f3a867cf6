"""Tool calls: a request and the tools on offer; the answer is one call as JSON, or "none" where no tool fits.

`schemas` holds the tools' JSON schemas; the prompt shows them in short. Graded by how many tools are on
offer. "new" is a tool that pretraining never shows. An item is a call.
"""

from __future__ import annotations

import json

from ._random import Random
from ._sample import sample
from ._words import FRIENDS, TOWNS

SHARE = 0.045
_KINDS = {"one": 0.3, "choose": 0.6, "none": 0.1}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"other_words": 1},
    "new": {"new_tool": 1},
    "new_test": {"new_tool": 1},
}
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
COLORS = "red green blue white amber purple".split()
VALUES = {  # of a parameter: what it may be (an integer range, or words), as it stands in the schema too
    "town": TOWNS,
    "day": DAYS,
    "friend": FRIENDS,
    "minutes": range(2, 60),
    "seats": range(2, 9),
    "color": COLORS,
    "level": range(1, 100),
}
TOOLS = {
    "weather": (
        ("town", "day"),
        ["How is the weather in {town} on {day}?", "Will it rain on {day} in {town}?"],
    ),
    "timer": (("minutes",), ["Wake me in {minutes} minutes.", "Set a timer of {minutes} minutes."]),
    "call": (("friend", "day"), ["Call {friend} on {day}.", "I want to talk to {friend} on {day}."]),
    "table": (
        ("town", "seats"),
        ["Book a table for {seats} in {town}.", "{seats} of us want to eat in {town}."],
    ),
    "lamp": (
        ("color", "level"),
        ["Make the lamp {color} at {level} percent.", "Turn the light to {level} percent {color}."],
    ),
    "train": (
        ("town", "friend", "day"),
        ["Buy {friend} a train to {town} on {day}.", "On {day} {friend} takes the train to {town}."],
    ),
}
NEW_TOOLS = {
    "parcel": (
        ("friend", "town", "level"),
        [
            "Send {friend} a parcel of {level} grams to {town}.",
            "A {level} gram parcel goes to {friend} in {town}.",
        ],
    )
}
OTHER_WORDS = {
    "weather": "{town}, {day}: sun or rain?",
    "timer": "{minutes} minutes from now, ring.",
    "call": "{day} is the day to phone {friend}.",
    "table": "In {town}, dinner for {seats} please.",
    "lamp": "{color} light, {level} percent, please.",
    "train": "{friend} goes to {town} by train, {day}.",
}
IDLE = ["Tell me a joke.", "What do you think of {friend}?", "Sing about {town}.", "I like {color}."]
NONE = "none"


def schema(name: str) -> dict:
    """The JSON schema of a tool."""
    properties = {}
    for parameter in (TOOLS | NEW_TOOLS)[name][0]:
        values = VALUES[parameter]
        properties[parameter] = {"type": "integer"} if isinstance(values, range) else {"type": "string"}
        if parameter in ("day", "color"):
            properties[parameter]["enum"] = list(values)
    return {
        "name": name,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        },
    }


def signature(name: str) -> str:
    """A tool as a prompt shows it: weather(town: string, day: string)."""
    properties = schema(name)["parameters"]["properties"]
    parameters = ", ".join(f"{parameter}: {rule['type']}" for parameter, rule in properties.items())
    return f"{name}({parameters})"


def draw(random: Random, kind: str) -> dict:
    tools = list(TOOLS)
    name = "parcel" if kind == "new_tool" else random.choice(tools)
    parameters, requests = (TOOLS | NEW_TOOLS)[name]
    others = random.sample(
        [other for other in tools if other != name], 1 if kind == "new_tool" else random.randint(1, 2)
    )
    offered = others if kind == "none" else [name] if kind == "one" else [name, *others]
    random.shuffle(offered)
    values = {parameter: random.choice(VALUES[parameter]) for parameter in VALUES}
    request = random.choice(requests)
    if kind == "other_words":
        request = OTHER_WORDS[name]
    if kind == "none" and random.random() < 0.4:
        request = random.choice(IDLE)
    arguments = {parameter: values[parameter] for parameter in parameters}
    answer = NONE if kind == "none" else json.dumps({"name": name, "arguments": arguments})
    request = request.format(**values)
    return {
        "prompt": f"Tools: {'; '.join(map(signature, offered))}\nRequest: {request}\nCall:",
        "completion": f" {answer}",
        "answer": answer,
        "schemas": [schema(tool) for tool in offered],
        "item": (
            f"request {request}" if kind == "none" else f"{name} {' '.join(map(str, arguments.values()))}"
        ),
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def problem(schemas: list[dict], call: object) -> str | None:
    """What is wrong with a call by the schemas of the tools on offer; None where it is valid."""
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return "a call has a name and arguments, nothing else"
    rules = next((tool["parameters"] for tool in schemas if tool["name"] == call["name"]), None)
    if rules is None:
        return f"there is no tool {call['name']!r}"
    arguments = call["arguments"]
    if not isinstance(arguments, dict) or set(arguments) != set(rules["required"]):
        return f"{call['name']} takes {', '.join(rules['required'])}"
    for name, value in arguments.items():
        rule = rules["properties"][name]
        kind = {"string": str, "integer": int}[rule["type"]]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is no {rule['type']}"
        if value not in rule.get("enum", [value]):
            return f"{name} is none of {', '.join(rule['enum'])}"
    return None


def verify(row: dict, answer: str) -> float:
    """1.0 for the right call in any spelling of JSON; 0.5 for a valid call of the right tool, 0.25 for
    another valid call.
    """
    right, text = row["answer"], answer.strip()
    if NONE in (right, text):
        return float(right == text)
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    if problem(row["schemas"], call):
        return 0.0
    right_call = json.loads(right)
    return 1.0 if call == right_call else 0.5 if call["name"] == right_call["name"] else 0.25
