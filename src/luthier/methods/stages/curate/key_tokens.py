"""Gives more weight to the tokens that decide a tool call: where its name differs from the other tools'
names, and where each argument begins.

Their weight balances them with all other tokens, up to `most`. With `sft` and normalize: weights it is the
paper's loss. Departs: where names differ is found by characters, so other tools' names need not be tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, TOOLS
from luthier.methods.stages._base import Stage, pieces
from luthier.registry import Column, stage

TOKEN_WEIGHTS = Column("token_weights", per="token", says="a weight for each supervised token")


@stage(
    paper="arXiv:2412.15495",
    row="tl-training",
    requires=[COMPLETIONS, TOOLS],
    provides=[TOKEN_WEIGHTS],
    use_when="you train tool calling and the tokens that decide a call (its name, the start of each"
    " argument) should weigh more.",
    costs="no model is read.",
    covers="weights on the key tokens of tool calls; failed calls are read and not learned; a reward for"
    " calls.",
    tests=[
        "methods/stages/curate/test_key_tokens.py::test_key_tokens_of_a_call",
        "methods/stages/curate/test_key_tokens.py::test_failed_calls_are_read_and_not_learned",
        "methods/stages/curate/test_key_tokens.py::test_a_tool_call_is_judged_by_its_first_fault",
    ],
)
class KeyTokens(Stage):
    """Column `token_weights`: min(others / keys, most) at key tokens, 1 elsewhere, for each
    supervised token.
    """

    most: Annotated[float, Field(ge=1)] = 9.0  # maximum weight of a key token

    def __call__(self, rows, roles):
        for row in self.usable(rows, roles):
            encoded, weights = roles.policy.architecture.encode(row, roles.renderer), []
            for completion, ids, marks in zip(
                row["completions"], encoded.completions, encoded.supervised, strict=True
            ):
                keys = self.keys(roles, row, completion, ids) & {i for i, m in enumerate(marks) if m}
                others = sum(marks) - len(keys)
                weight = min(others / len(keys), self.most) if keys else 1.0
                weights.append([weight if i in keys else 1.0 for i, m in enumerate(marks) if m])
            yield {**row, "token_weights": weights}

    def keys(self, roles: Any, row: dict, completion: Any, ids: list[int]) -> set[int]:
        """Places of the key tokens of a completion."""
        texts = pieces(roles, ids)
        ends = [0]
        for text in texts:
            ends.append(ends[-1] + len(text))
        places = decisive("".join(texts), calls_of(completion), [t["function"]["name"] for t in row["tools"]])
        return {next(i for i in range(len(texts)) if ends[i] <= place < ends[i + 1]) for place in places}


def calls_of(completion: Any) -> list[dict]:
    """The tool calls of a completion, in order."""
    turns = (
        completion if isinstance(completion, list) and completion and isinstance(completion[0], dict) else []
    )
    return [
        call["function"]
        for turn in turns
        if turn["role"] == "assistant"
        for call in turn.get("tool_calls") or ()
    ]


def decisive(text: str, calls: list[dict], tools: list[str]) -> Iterator[int]:
    """Characters of a text at which a call is decided."""
    at = 0
    for call in calls:
        name = call["name"]
        start = text.find(name, at)
        if start < 0:
            continue
        for other in tools:
            if other != name:
                same = next(
                    (k for k, (a, b) in enumerate(zip(name, other, strict=False)) if a != b),
                    min(len(name), len(other)),
                )
                yield start + min(same, len(name) - 1)
        at = start + len(name)
        arguments = call.get("arguments")
        for key, value in arguments.items() if isinstance(arguments, dict) else ():
            named = text.find(json.dumps(key), at)
            if named < 0:
                continue
            yield named + 1
            at = named + len(key) + 2
            begin = next(
                (
                    text.find(w, at)
                    for w in (json.dumps(value), json.dumps(value, ensure_ascii=False))
                    if text.find(w, at) >= 0
                ),
                -1,
            )
            if begin >= 0:
                yield begin + (1 if isinstance(value, str) and value else 0)
                at = begin + 1
