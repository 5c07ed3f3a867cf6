"""by_source: the numbers of each source are those of its rows alone."""

from __future__ import annotations

import pytest

from luthier.methods.evaluators._base import TokenStats
from luthier.registry import build


def test_each_source_has_its_own_numbers(tmp_path):
    rows = [{"id": str(k), "prompt": "", "completions": ["x"], "source": "ab"[k % 2]} for k in range(4)]
    stats = {str(k): TokenStats(k + 1, 2.0 * k, float(k + 1 if k < 3 else 0)) for k in range(4)}
    out = build("evaluator", "by_source").summarize(stats, None, rows, tmp_path, "after")
    assert out["source_accuracy/a"] == 1.0 and out["source_accuracy/b"] == 0.5
    assert out["source_loss/a"] == pytest.approx(4 / 4) and out["source_loss/b"] == pytest.approx(8 / 6)
