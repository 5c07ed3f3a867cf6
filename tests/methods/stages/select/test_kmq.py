"""kmq in rounds: budgets move to what the model lacks."""

from __future__ import annotations

import torch

from luthier.methods.stages.select.kmq import KMQ
from luthier.registry import build


def test_rounds_move_the_budget_from_noise_to_what_is_lacking(monkeypatch):
    """Ten clusters of thirty rows, two of noise (no answer of theirs earns anything), two of a skill that is
    lacking, six that are known.
    """
    labels = torch.arange(300) % 10
    gain = torch.tensor([-0.5, -0.5, 1.5, 1.5, *[0.0] * 6], dtype=torch.float64)
    calls = []

    def gains(self, roles, learned, new, number):
        calls.append((len(learned), len(new)))
        return gain[torch.tensor([row["cluster"] for row in new])]

    monkeypatch.setattr(KMQ, "gains", gains)
    rows = [{"id": str(i), "prompt": "x", "cluster": int(labels[i])} for i in range(300)]
    stage = KMQ(n=90, rounds=3)
    chosen = stage.in_rounds(None, rows, labels, torch.ones(300).double(), torch.Generator().manual_seed(0))
    assert len(chosen) == len({*chosen}) == 90 and calls == [(30, 30), (60, 30)]
    later = torch.bincount(labels[chosen[30:]], minlength=10)
    assert int(later[:2].sum()) < 0.5 * 12 and int(later[2:4].sum()) > 1.5 * 12
    assert torch.bincount(labels[chosen[:30]], minlength=10).tolist() == [3] * 10


def test_one_round_is_kmq_and_rounds_add_up(tiny_roles):
    rows = [{"id": str(i), "prompt": f"{i % 3}+{i}=", "completions": [str(i)]} for i in range(12)]
    kmq = {"name": "kmq", "n": 5, "clusters": 2, "rate": 1e-3, "max_new_tokens": 2}
    once = [row["id"] for row in build("stage", kmq)(rows, tiny_roles)]
    assert once == [row["id"] for row in build("stage", {**kmq, "rounds": 1})(rows, tiny_roles)]
    before = tiny_roles.tuner.tensors()
    chosen = list(build("stage", {**kmq, "rounds": 2})(rows, tiny_roles))
    assert len(chosen) == len({row["id"] for row in chosen}) == 5
    after = tiny_roles.tuner.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
