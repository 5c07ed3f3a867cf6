"""yes_no: a rationale becomes a second completion; asks about every label."""

from __future__ import annotations

import pytest

from luthier.recipe.validate import DryRunRoles
from luthier.registry import build


def test_a_rationale_becomes_a_second_completion():
    row = {"id": "a", "prompt": "fix: ", "completions": ["x = 1"], "rationale": "x was 2", "scores": [1.0]}
    stage = build("stage", {"name": "rationale", "before": "# "})
    (out,) = stage([row, {**row, "rationale": ""}], DryRunRoles())
    assert (
        out["completions"] == ["x = 1", "# x was 2"]
        and out["tasks"] == ["answer", "rationale"]
        and "scores" not in out
    )


def test_yes_no_asks_about_every_label():
    rows = [
        {"id": f"r{i}", "prompt": f"text {i}\n", "completions": ["good" if i % 3 else "bad"]}
        for i in range(9)
    ]
    questions = {"good": ["Is it good?", "Is it liked?"], "bad": ["Is it bad?"]}
    stage = {"name": "yes_no", "questions": questions, "task": "films"}
    out = build("stage", stage)(rows, DryRunRoles())
    assert len(out) == 9 * 3 and len({r["id"] for r in out}) == 27
    assert all(
        (r["completions"] == ["yes"]) == (r["asked"] == ("good" if int(r["id"][1]) % 3 else "bad"))
        for r in out
    )
    even = build("stage", {**stage, "balance": True, "cap": 40})(rows, DryRunRoles())
    assert len(even) == 40 and len({r["id"] for r in even}) == 40
    assert sum(r["completions"] == ["yes"] for r in even) == pytest.approx(20, abs=2)
    other = [{**r, "task": "books"} for r in out]
    kept = build("stage", {"name": "groups", "drop": ["books"]})([*out, *other], DryRunRoles())
    held = build("stage", {"name": "groups", "keep": ["books"]})([*out, *other], DryRunRoles())
    assert {r["task"] for r in kept} & {r["task"] for r in held} == set() and len(kept) == len(held) == 27
