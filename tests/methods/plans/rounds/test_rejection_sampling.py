"""rejection_sampling: what is accepted is what is learned; with one answer it is best-of-n distillation."""

from __future__ import annotations

import torch

from helpers.rounds import Table, perform
from luthier.registry import build

NAMES = ["a", "a a", "a a a", "b"]
PROMPTS = [{"id": str(p), "prompt": [p]} for p in range(6)]
LENGTH = {"name": "length"}


def test_accepted_answers_are_learned(recipe, tmp_path):
    plan = {"name": "rejection_sampling", "n": 12, "reward": LENGTH, "least": 2.0, "most": None}
    rounds, _ = perform(plan, recipe, Table(torch.zeros(6, 4)), PROMPTS, NAMES, tmp_path)
    for row in rounds[0].rows:
        assert row["scores"] == sorted(set(row["scores"]), reverse=True) and min(row["scores"]) >= 2
    probabilities = rounds[0].after.log_policy().detach().exp()
    assert float(probabilities[:, 1:3].sum(-1).min()) > 0.9


def test_one_answer_is_the_best_of_n(recipe, tmp_path):
    plan = {"name": "rejection_sampling", "n": 12, "reward": LENGTH}
    rounds, _ = perform(plan, recipe, Table(torch.zeros(6, 4)), PROMPTS, NAMES, tmp_path)
    assert all(len(row["completions"]) == 1 for row in rounds[0].rows)
    raft = build("plan", "raft")
    assert raft.rounds and build("plan", "rejection_sampling").most == 1


def test_rows_without_a_good_answer_leave():
    rows = [{"id": "x", "prompt": "p", "completions": ["a", "b"], "scores": [0.0, 0.2], "threshold": 0.5}]
    assert build("stage", "accept")(rows, nobody()) == []
    assert build("stage", {"name": "accept", "least": 0.1})(rows, nobody())[0]["completions"] == ["b"]


def nobody():
    from types import SimpleNamespace

    from luthier.clock import Clock

    return SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
