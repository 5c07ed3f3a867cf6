"""self_rationalization: a judge of five ratings gains over its start, and rounds end where all is right."""

from __future__ import annotations

import torch

from helpers.rounds import Table, perform
from luthier.registry import build

NAMES = [f"because: {k}" for k in range(1, 6)]
RIGHT = torch.arange(40) % 5
ROWS = [{"id": str(p), "prompt": [p], "answer": int(RIGHT[p]) + 1} for p in range(40)]
PLAN = {"name": "self_rationalization", "n": 8, "beta": 0.1}


class Judge(Table):
    """A judge that reads two features of a row, so that what it learns holds for other rows."""

    def __init__(self, logits, features=None):
        super().__init__(logits)
        rng = torch.Generator().manual_seed(0)
        self.features = torch.nn.functional.one_hot(RIGHT, 5).float() + 0.3 * torch.randn(
            40, 5, generator=rng
        )

    def log_policy(self):
        return (self.features @ self.logits).log_softmax(-1)


def test_two_rounds_make_a_better_judge(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.rounds.Table", Judge)
    start = Judge(0.8 * torch.eye(5) + 0.5 * torch.randn(5, 5, generator=torch.Generator().manual_seed(3)))
    rounds, end = perform(
        PLAN, recipe, start, ROWS[:30], NAMES, tmp_path, steps=30, lr=0.05, held_out=ROWS[30:]
    )
    assert len(rounds) == 2
    accuracy = [exact(start), exact(rounds[0].after), exact(rounds[1].after)]
    assert accuracy[0] < accuracy[1] <= accuracy[2] or accuracy[0] + 0.05 < accuracy[2], accuracy
    for one in rounds:
        assert {row["provenance"]["round"] for row in one.rows} == {rounds.index(one)}
        for row in one.rows:
            chosen, rejected = (ids[0] + 1 for ids in row["completions"])
            assert chosen == row["answer"] and abs(rejected - chosen) >= 1


def exact(judge: Table) -> float:
    """The probability of the right rating on held-out rows."""
    likely = judge.log_policy().detach().exp()[30:]
    return float(likely[torch.arange(10), RIGHT[30:]].mean())


def test_it_ends_where_every_judgement_is_right(recipe, tmp_path):
    logits = 50.0 * torch.nn.functional.one_hot(RIGHT, 5)
    logits[0] = 0.0
    rounds, end = perform({**PLAN, "rounds": 4}, recipe, Table(logits), ROWS, NAMES, tmp_path, steps=80, lr=2)
    assert len(rounds) < 4 and "nothing is left to learn from" in end.notes[-1]
    assert build("plan", PLAN).judging()["reward"] == {"name": "exact_match", "extract": "last_number"}
