"""reward_calibration: agreement, area and calibration error by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from luthier.registry import build

ROLES = SimpleNamespace(text=str)


def measured(rows, folder, reward, **settings):
    evaluator = build("evaluator", {"name": "reward_calibration", "reward": reward, **settings})
    return evaluator.run(ROLES, rows, folder, "after")


def test_by_hand(tmp_path):
    rows = [
        {"id": "a", "prompt": "x", "completions": ["a b c", "a", "a"], "scores": [1.0, 0.0, 0.5]},
        {"id": "b", "prompt": "x", "completions": ["a", "a b"], "scores": [1.0, -1.0]},
    ]
    out = measured(rows, tmp_path, {"name": "length"})
    assert out == {
        "reward_agreement": pytest.approx((1 + 1 + 0.5 + 0) / 4),
        "reward_auc": pytest.approx(4 / 6),
    }
    assert "reward_calibration_error" not in out and measured(rows[:1], tmp_path, {"name": "length"}, n=1)


def test_probabilities_are_calibrated_or_not(tmp_path):
    rows = [
        {
            "id": str(i),
            "prompt": "x",
            "answer": "red cup",
            "completions": ["red cup", "red"],
            "scores": [1.0, float(i % 2)],
        }
        for i in range(4)
    ]
    out = measured(rows, tmp_path, "f1", bins=2)  # 1 and 2/3: both in the upper bin, three quarters are right
    assert out["reward_calibration_error"] == pytest.approx(abs((1 + 2 / 3) / 2 - 0.75))
    (line,) = json.loads((tmp_path / "reward_calibration-after.json").read_text())
    assert line == pytest.approx([8, (1 + 2 / 3) / 2, 0.75])
