"""famo: weights on the simplex that shift to the slower task, by the authors' formula."""

from __future__ import annotations

import pytest
import torch

from helpers.terms import Quadratics
from luthier.registry import build


def test_weights_shift_to_the_slower_task():
    """Two losses of one vector's halves: one is ten times as steep."""
    run = Quadratics("famo", weight_learning_rate=0.1)
    run.go(30)
    fast, slow = run.metrics["mix/fast"], run.metrics["mix/slow"]
    assert fast + slow == pytest.approx(1) and min(fast, slow) > 0
    x = run.state("famo")["x"]
    assert x[1] > x[0] + 0.1


def test_weights_are_those_of_the_authors_formula():
    made = build("estimator", "famo")
    weights = made.weights(torch.tensor([0.0, 0.0]).double(), torch.tensor([1.0, 4.0]).double())
    assert weights.tolist() == pytest.approx([1.6, 0.4])  # z / D, of mean 1
    upper = {"x": [0.0, 0.0], "mean": [0.0, 0.0], "square": [0.0, 0.0], "count": 0}
    made.move(upper, torch.tensor([1.0, 1.0]).double(), torch.tensor([0.5, 1.0]).double())
    assert upper["x"] == pytest.approx(
        [-0.025, 0.025], rel=1e-4
    )  # Adam's first step: the one that fell loses
    assert upper["mean"] == pytest.approx([0.1 * 0.25 * 0.6931472, -0.1 * 0.25 * 0.6931472], rel=1e-5)
