"""V-REx: the mean of the terms' losses plus their variance, so that what differs between environments is not
relied on.

With n environments of losses L_e, the gradient of mean L + penalty * var L gives environment e the weight
1 + 2 penalty (L_e - mean L) of an equal share (Krueger et al., 2021). The penalty begins after `anneal`
steps, and then the whole is divided by it where it is above 1, as in the authors' code. Environments are
terms, as objective `by_source` makes them.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:2003.00688",
    row="bonsai-rfc",
    provides=[GRADIENT],
    use_when="rows come from several environments, and what predicts in one of them only must not be"
    " learned.",
    costs="one more forward pass over each batch.",
    starting_rate="that of the tuner.",
    covers="risk extrapolation between environments, as one of the methods that rich features are for.",
    omits="the rich features themselves, by discovery and synthesis; IRM, CLOvE; results on ColoredMNIST.",
    tests=[
        "methods/estimators/multi_objective/test_v_rex.py::test_the_gradient_is_that_of_mean_and_variance",
        "methods/estimators/multi_objective/test_v_rex.py::test_losses_draw_together",
    ],
)
class VREx(Estimator):
    """One weighted backward pass; weights may be negative. With one term it equals backprop."""

    penalty: Annotated[float, Field(ge=0), Range(0.1, 1e4, log=True)] = 10.0  # what the variance counts
    anneal: Annotated[int, Field(ge=0)] = 0  # steps without it at first

    def step(self, closure, chain, clock):
        names = getattr(closure, "names", ())
        if len(names) < 2 or clock.step < self.anneal:
            loss = closure()
            chain.step(gradients(chain))
            return loss
        closure(grad=False)
        losses = torch.tensor([closure.values[name] for name in names], dtype=torch.float64)
        weights = self.weights(losses)
        closure(only=lambda place, name: float(weights[place]))
        chain.step(gradients(chain))
        if note := getattr(closure, "note", None):
            note({"risk_variance": float(losses.var(unbiased=False))})
        return float(losses.sum())

    def weights(self, losses: torch.Tensor) -> torch.Tensor:
        """[terms] losses -> [terms] weights, of mean 1 before the division by the penalty."""
        weights = 1 + 2 * self.penalty * (losses - losses.mean())
        return weights / max(1.0, self.penalty)
