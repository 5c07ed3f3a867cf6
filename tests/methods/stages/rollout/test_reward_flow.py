"""normalize_rewards, dynamic_rollout: what becomes of rewards, and of prompts that teach nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from luthier.clock import Clock
from luthier.methods.roles.averages.reward_moments import Moments
from luthier.methods.stages.rollout import dynamic_rollout
from luthier.registry import build


def test_moments_are_those_of_all_rewards_so_far():
    rng, roles = np.random.default_rng(0), SimpleNamespace(reward_moments=Moments())
    stage, every = build("stage", {"name": "normalize_rewards", "clip": 1.5}), []
    for size in (2, 3, 1):
        scores = (100 + 7 * rng.standard_normal((size, 4))).tolist()
        every += [score for row in scores for score in row]
        rows = [{"id": str(i), "completions": [], "scores": s} for i, s in enumerate(scores)]
        out = [row["scores"] for row in stage(rows, roles)]
        want = (np.array(scores) - np.mean(every)) / np.std(every, ddof=1)
        np.testing.assert_allclose(out, want.clip(-1.5, 1.5), rtol=1e-9)
        assert rows[0]["scores"] == scores[0]
    halves = [Moments(), Moments()]
    halves[0].add(every)
    halves[1].add(every[:5])
    halves[1].load_state_dict(halves[1].state_dict())  # as a checkpoint brings it back
    halves[1].add(every[5:])
    assert float(halves[0].squares) == pytest.approx(float(halves[1].squares))
    scaled = build("stage", {"name": "normalize_rewards", "center": False, "clip": None})
    (row,) = scaled([{"completions": [], "scores": [0.0, 5.0]}], SimpleNamespace(reward_moments=Moments()))
    assert row["scores"] == pytest.approx([0.0, 2**0.5])


def test_prompts_without_advantage_are_replaced(monkeypatch):
    """Prompts 0, 1 and 3 are answered alike; only as many are sampled as it takes."""
    sampled: list[str] = []

    class Writes:
        def __init__(self, **settings):
            self.active_requires = frozenset()

        def __call__(self, rows, roles):
            for row in rows:
                sampled.append(row["id"])
                alike = row["id"] in ("0", "1", "3")
                yield {**row, "completions": ["a", "a" if alike else "a b"], "truncated": [False] * 2}

    monkeypatch.setattr(dynamic_rollout, "Rollout", Writes)
    warnings: list[str] = []
    roles = SimpleNamespace(clock=Clock(), warn=warnings.append, text=str)
    stage = build("stage", {"name": "dynamic_rollout", "rows": 3, "reward": "length"})
    rows = [{"id": str(i), "prompt": "x"} for i in range(9)]
    out = stage(rows, roles)
    assert [row["id"] for row in out] == ["2", "4", "5"] and sampled == list("012345")
    assert all(row["scores"] == [1.0, 2.0] for row in out) and not warnings
    assert [row["id"] for row in stage(rows[:4], roles)] == ["2"] and "1 of 4" in warnings[0]
