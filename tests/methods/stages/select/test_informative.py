"""informative, overlong_penalty: groups that teach nothing leave; TRL's punishment of length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.clock import Clock
from luthier.registry import build

NOBODY = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)


def test_only_mixed_groups_stay():
    rows = [
        {"id": str(i), "completions": ["a", "b"], "scores": s}
        for i, s in enumerate([[1, 1], [0, 1], [0, 0.5], [1, 0]])
    ]
    ids = lambda **settings: [
        r["id"] for r in build("stage", {"name": "informative", **settings})(rows, NOBODY)
    ]
    assert ids() == ["1", "2", "3"] and ids(rows=2) == ["1", "2"] and ids(least=0.5) == ["1", "3"]


def test_the_punishment_is_trls():
    rewards = pytest.importorskip("trl.rewards")
    lengths = [10, 60, 68, 69, 80, 99, 100, 130]
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=32)
    row = {"id": "r", "completions": [[7] * n for n in lengths], "scores": [1.0] * len(lengths)}
    stage = build("stage", {"name": "overlong_penalty", "max_new_tokens": 100, "cache": 32})
    (out,) = stage([row], NOBODY)
    want = [1.0 + x for x in theirs(completion_ids=row["completions"])]
    assert out["scores"] == pytest.approx(want)
