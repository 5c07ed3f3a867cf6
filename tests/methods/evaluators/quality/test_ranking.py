"""ranking: closed forms, scikit-learn's NDCG, and the policy's own order."""

from __future__ import annotations

import math
import random

import pytest
import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.evaluators.quality.ranking import Ranking, measure


def test_the_measures_by_hand():
    assert measure([True, True, False]) == (1.0, 1.0, 0.0)
    assert measure([False] * 5) == (0.0, 0.0, 51.0)
    precision, ndcg, clicks = measure([False] * 12 + [True, False, True])
    assert (precision, clicks) == (0.0, 1.0)
    by_hand = (1 / math.log2(14) + 1 / math.log2(16)) / (1 + 1 / math.log2(3))
    assert ndcg == pytest.approx(by_hand)
    metrics = pytest.importorskip("sklearn.metrics")
    chance = random.Random(0)
    for _ in range(20):
        right = [chance.random() < 0.4 for _ in range(12)] + [True]
        scores = [[float(-place) for place in range(13)]]
        assert measure(right)[1] == pytest.approx(metrics.ndcg_score([list(map(float, right))], scores))


@torch.no_grad()
def test_candidates_are_ranked_by_the_policy(tmp_path, monkeypatch):
    """Where right is what the policy likes best, the ranking is perfect; likes it least, it is not."""
    roles, rows = cast(), make_rows(3, k=3)
    batch = batch_of(rows)
    means = batch.means(roles.policy.logprobs(batch)).view(3, 3).tolist()
    place = "luthier.methods.evaluators.quality.ranking.batches"
    monkeypatch.setattr(place, lambda roles, some, size: [batch_of(some)] if some else [])
    best = [{**row, "scores": [float(x == max(own)) for x in own]} for row, own in zip(rows, means)]
    worst = [{**row, "scores": [float(x == min(own)) for x in own]} for row, own in zip(rows, means)]
    evaluator = Ranking()
    assert evaluator.run(roles, best, tmp_path, "after") == {"r_precision": 1.0, "ndcg": 1.0, "clicks": 0.0}
    after = evaluator.run(roles, worst, tmp_path, "after")
    assert after["r_precision"] == 0.0 and after["ndcg"] == pytest.approx(0.5)
    assert evaluator.run(roles, [], tmp_path, "after") == {}
