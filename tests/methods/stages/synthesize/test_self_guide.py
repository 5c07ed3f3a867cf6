"""self_guide: filters leave what is valid, labels are balanced."""

from __future__ import annotations

import re
from collections import Counter

from helpers.synthesis import Scripted, nobody
from luthier.registry import build

EXAMPLES = [
    {"id": "0", "prompt": "good day all", "completions": ["warm"]},
    {"id": "1", "prompt": "bad day", "completions": ["cold"]},
    {"id": "2", "prompt": "so so day it", "completions": ["warm"]},
]
INPUTS = ["fine morning", "fine morning", "x" * 90, "", "sad night", "good day all", "what a day", "odd week"]


def script(prompt: str, seed: int) -> str:
    if not prompt.endswith("Output:"):
        label = re.search(r"Output: (\w+)\nInput:$", prompt)
        return (f"{label[1]} " if label else "") + INPUTS[seed % len(INPUTS)] + str(seed % 5)
    text = prompt.rsplit("Input: ", 1)[1]
    return "warm" if "morning" in text or "warm" in text else "cold" if "cold" in text else "no idea"


def stage(reply, **settings):
    labels = ["warm", "cold"]
    return build("stage", {"name": "self_guide", "writer": Scripted(reply), "labels": labels, **settings})


def test_filters_leave_exactly_what_is_valid():
    """Of a fixed list of inputs: copies, empty and long ones leave, then inputs whose answer is no label."""
    inputs = iter(INPUTS)

    def listed(prompt: str, seed: int) -> str:
        return next(inputs) if not prompt.endswith("Output:") else script(prompt, seed)

    settings = {"n": len(INPUTS), "attempts": 1, "deviations": 2.0, "instruction": "How is it?"}
    roles = nobody()
    out = list(stage(listed, **settings)(EXAMPLES, roles))
    assert [row["prompt"] for row in out] == ["How is it?\n\nfine morning"]
    assert out[0]["completions"] == ["warm"] and out[0]["provenance"]["sources"] == ["0", "1", "2"]
    assert "3 is empty or a copy" in roles.sentences[-1] and "3 is no label" in roles.sentences[-1]
    assert "1 is too long or short" in roles.sentences[-1]


def test_labels_are_balanced():
    out = list(stage(script, n=9, deviations=9.0, attempts=30)(EXAMPLES, nobody()))
    counts = Counter(row["completions"][0] for row in out)
    assert len(out) == 9 and max(counts.values()) - min(counts.values()) == 1


def test_a_few_lengths_bound_the_others():
    guide = build("stage", {"name": "self_guide", "deviations": 2.0})
    bounds = guide.bounds(["a" * 10, "a" * 14])
    assert bounds == (8, 16)
    assert guide.bad_answer("x" * 17, bounds) and not guide.bad_answer("x" * 16, bounds)
