"""Scores a tool call by how it fails: the earlier the fault, the lower the score.

The call is JSON with a name and arguments, bare or between <tool_call> marks; the row's `answer` is the right
call, and its `tools` define the parameters.
"""

from __future__ import annotations

import json
import re
from typing import Any

from luthier.methods.formats._base import ANSWER, TOOLS
from luthier.methods.rewards._base import Reward
from luthier.registry import reward

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)
FAULTS = {  # (hallucinated, redundant, missing) parameters -> score
    (True, True, True): -1.8,
    (True, True, False): -1.3,
    (True, False, True): -1.3,
    (False, True, True): -1.0,
    (True, False, False): -0.8,
    (False, True, False): -0.5,
    (False, False, True): -0.5,
}


@reward(
    paper="arXiv:2412.15495",
    row="tl-training",
    requires=[ANSWER, TOOLS],
    use_when="answers are tool calls with a known right call: partial scores tell how far off one is.",
    costs="parsing JSON for each completion.",
)
class ToolCall(Reward):
    """-2 no call that can be parsed, or no such tool; -1.5 another tool; -1.8 to -0.5 parameters that do not
    exist, are superfluous or are missing; -0.25 a wrong value; 1 all right.
    """

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        gold = call_in(self.column(row, "answer"))
        parameters = {
            t["function"]["name"]: set(t["function"].get("parameters", {}).get("properties", {}))
            for t in self.column(row, "tools")
        }
        if gold is None:
            raise ValueError(f"row {row.get('id')}: its reference answer is not a tool call")
        return [self.judged(call_in(text), gold, parameters) for text in texts]

    def judged(self, call: dict | None, gold: dict, parameters: dict[str, set[str]]) -> float:
        if call is None or call["name"] not in parameters:
            return -2.0
        if call["name"] != gold["name"]:
            return -1.5
        called, required = call["arguments"].keys(), gold["arguments"].keys()
        exists = parameters[call["name"]] | required
        faults = (bool(called - exists), bool((called & exists) - required), bool(required - called))
        if any(faults):
            return FAULTS[faults]
        return 1.0 if call["arguments"] == gold["arguments"] else -0.25


def call_in(value: Any) -> dict | None:
    """{"name", "arguments"} out of text, JSON or a call as messages carry it; None where there is none."""
    if isinstance(value, str):
        marked = CALL.search(value)
        inside = (marked.group(1) if marked else value).strip()
        begins = inside.find("{")
        try:
            value = json.JSONDecoder().raw_decode(inside[begins:])[0] if begins >= 0 else None
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list):
        value = value[0] if value else None
    value = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return {"name": value["name"], "arguments": arguments} if isinstance(arguments, dict) else None
