"""group_dro: exponentiated weights in closed form, and the worst group alone."""

from __future__ import annotations

import pytest
import torch

from helpers.terms import Quadratics
from luthier.registry import build


def test_weights_grow_with_the_losses():
    made = build("estimator", {"name": "group_dro", "step_size": 0.5})
    before, losses = torch.tensor([0.5, 0.5]).double(), torch.tensor([1.0, 3.0]).double()
    after = made.weights(before, losses)
    assert after.tolist() == pytest.approx((torch.tensor([0.5, 1.5]).double().softmax(0)).tolist())
    assert made.weights(after, losses)[1] > after[1]  # they go on from the last step's
    run = Quadratics("group_dro", step_size=0.0).go(3)
    plain = Quadratics("backprop").go(3)
    torch.testing.assert_close(run.model.weight, plain.model.weight)  # equal weights: the plain objective


def test_the_worst_group_alone():
    """The steep loss is the worst at first, and falls until the two are alike."""
    run = Quadratics("group_dro", hard=True)
    run.go(1)
    assert run.model.weight[0] > 0 and run.model.weight[1] == 0
    assert (run.metrics["mix/fast"], run.metrics["mix/slow"]) == (1, 0)
    soft = Quadratics("group_dro", step_size=0.1).go(10)
    assert soft.metrics["mix/fast"] > 0.5 and soft.state("group_dro")["weights"] == pytest.approx(
        [soft.metrics["mix/fast"], soft.metrics["mix/slow"]]
    )
