"""separability: its death times, its direction, and which step it names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from luthier.methods.evaluators._trajectory import spearman
from luthier.methods.evaluators.representation import separability as module
from luthier.methods.evaluators.representation.separability import Separability, death_times, separability


def blobs(distance: float, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(80, 4, generator=rng, dtype=torch.float64)
    points[40:, 0] += distance
    return points


def test_death_times_are_edges_of_the_tree():
    from scipy.sparse.csgraph import minimum_spanning_tree

    for seed in range(3):
        points = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tree = minimum_spanning_tree(torch.cdist(points, points).numpy())
        assert np.allclose(np.sort(tree.data), death_times(points).sort().values.numpy(), atol=1e-8)


def test_centres_further_apart_score_higher():
    distances = torch.tensor([5.0 + 3 * k for k in range(10)])
    scores = torch.tensor([separability(blobs(float(d))) for d in distances])
    assert spearman(distances, scores) > 0.95
    line = torch.arange(9.0)[:, None]  # equal distances: no clusters
    assert separability(line) == pytest.approx(0) and separability(torch.zeros(9, 2)) == 0.0


def test_the_best_step_of_a_run(roles, tmp_path, monkeypatch):
    distances = {0: 4.0, 10: 30.0, 20: 8.0}
    monkeypatch.setattr(module, "embed", lambda roles, *_: blobs(distances[roles.clock.step]))
    rows = [{"id": str(i), "prompt": f"{i}"} for i in range(80)]
    results = []
    for when, step in (("before", 0), ("during", 10), ("during", 10), ("after", 20)):
        roles.clock.step = step
        results.append(Separability().run(roles, rows, tmp_path, when))
    roles.clock.step = 0
    assert [r["separability_best_step"] for r in results] == [0.0, 10.0, 10.0, 10.0]
    lines = (tmp_path / "separability.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20]
    for r in results:
        assert r["separability_low"] < r["separability_high"]
        assert abs(r["separability"] - r["separability_low"]) < 0.2


def test_of_a_language_model(roles, tmp_path):
    rows = [{"id": str(i), "prompt": f"{i % 2} {i}"} for i in range(10)]
    assert 0 < Separability(subsamples=3).run(roles, rows, tmp_path, "before")["separability"] < 1
    assert Separability().run(roles, rows[:3], tmp_path, "before") == {}
