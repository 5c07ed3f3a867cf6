"""selective: the curve of risk and coverage against numpy, and a threshold that keeps its coverage."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.methods.evaluators.calibration.selective import risk_coverage, threshold
from luthier.methods.rewards.rules.length import Length
from luthier.registry import build


def test_the_curve_is_the_brute_force_one(monkeypatch):
    rng = np.random.default_rng(0)
    ratings, labels = rng.permutation(200) / 200, rng.integers(0, 2, 200).astype(float)
    curve = risk_coverage(ratings.tolist(), labels.tolist())
    order = np.argsort(-ratings)
    np.testing.assert_allclose(curve, np.cumsum(1 - labels[order]) / np.arange(1, 201))
    for coverage in (0.1, 0.5, 0.8, 1.0):
        assert np.mean(ratings >= threshold(ratings.tolist(), coverage)) == pytest.approx(coverage)
    texts = [f"text {i}" for i in range(200)]
    by_text = dict(zip(texts, ratings.tolist(), strict=True))
    monkeypatch.setattr(Length, "scores", lambda self, row, some: [by_text[text] for text in some])
    rows = [{"prompt": "q", "completions": texts[:120], "scores": labels[:120].tolist()}]
    rows.append({"prompt": "q", "completions": texts[120:], "scores": labels[120:].tolist()})
    evaluator = build("evaluator", {"name": "selective", "reward": "length", "coverage": 0.5})
    out = evaluator.run(None, rows, None, "after")
    assert out["aurc"] == pytest.approx(float(np.mean(curve)))
    assert out["selective_risk"] == pytest.approx(curve[99])
    assert out["judge_correlation"] == pytest.approx(float(np.corrcoef(ratings, labels)[0, 1]), abs=1e-5)
    assert evaluator.run(None, [], None, "after") == {}
