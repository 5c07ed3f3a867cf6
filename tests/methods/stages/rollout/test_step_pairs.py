"""step_pairs: every wrong completion makes a pair."""

from __future__ import annotations

import pytest

from helpers.objectives import text_roles
from luthier.methods.stages.rollout import step_pairs
from luthier.registry import build

REWARD = {"name": "exact_match", "extract": "after", "marker": "\n"}


@pytest.mark.parametrize("most, wrong", [(None, ["b\nW", "a\nW"]), (1, ["b\nW"])])
def test_every_wrong_completion_makes_a_pair(monkeypatch, most, wrong):
    """From nothing and after a good step the policy often ends right, after a bad one never: the pit of each
    solution is its own first bad step.
    """

    class Writes:
        def __init__(self, **settings):
            self.n = settings["n"]

        def __call__(self, requests, roles):
            for row in requests:
                goes_on = {"": "a\nR", "a\n": "R", "b\n": "W"}[row["prefix"]]
                yield {**row, "completions": [goes_on] * self.n}

    monkeypatch.setattr(step_pairs, "Rollout", Writes)
    stage = build("stage", {"name": "step_pairs", "n": 2, "reward": REWARD, "most": most})
    rows = [
        {"id": "w", "prompt": "Q", "completions": ["b\nW", "a\nR", "a\nW", "b\nW"], "answer": "\nR"},
        {"id": "r", "prompt": "Q", "completions": ["a\nR"], "answer": "\nR"},
    ]
    made = list(stage(rows, text_roles()))
    assert [r["id"] for r in made] == ["w", "w/wrong-1"][: len(wrong)]
    pits = {"b\nW": ("", "a\nR", "b\nW"), "a\nW": ("a\n", "R", "W")}
    assert [(r["prefix"], *r["completions"]) for r in made] == [pits[text] for text in wrong]
    assert all(r["scores"] == [1.0, 0.0] and min(r["advantages"]) == -1.0 for r in made)
