"""v_rex: its gradient in closed form, and losses that draw together."""

from __future__ import annotations

import torch

from helpers.terms import Quadratics
from luthier.registry import build


def test_the_gradient_is_that_of_mean_and_variance():
    losses = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64, requires_grad=True)
    (3 * (losses.mean() + 0.5 * losses.var(unbiased=False))).backward()
    made = build("estimator", {"name": "v_rex", "penalty": 0.5})
    torch.testing.assert_close(made.weights(losses.detach()), losses.grad)
    large = build("estimator", {"name": "v_rex", "penalty": 20.0}).weights(losses.detach())
    assert (large[0] < 0) and abs(float(large.sum()) - 3 / 20) < 1e-9


def test_losses_draw_together():
    """The steep loss begins at ten times the other; with the penalty it is left no further ahead."""

    def apart(**settings) -> float:
        weight = Quadratics("v_rex", **settings).go(10).model.weight.detach()
        return float((10 * (weight[0] - 1) ** 2 - (weight[1] - 1) ** 2).abs())

    assert apart(penalty=0.1) < 0.5 * apart(penalty=0.0)
    assert apart(penalty=0.1, anneal=10) == apart(penalty=0.0)
