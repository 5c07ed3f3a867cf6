"""SAM: takes the gradient at the worst point nearby, which finds flat minima. Two backward passes per step.

Departs: the perturbation uses the global batch, not each device's share (the paper's m-sharpness). Both
passes use the same dropout masks. The weights are restored bit for bit, from a copy of the trainable
parameters.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients, length, perturbed
from luthier.registry import estimator


@estimator(
    paper="arXiv:2010.01412",
    provides=[GRADIENT],
    use_when="few rows, overfitting, and time for twice the computation: it looks for flat minima.",
    costs="two forward and backward passes a step, and a copy of the trainable parameters.",
    starting_rate="that of the tuner.",
)
class SAM(Estimator):
    """Perturbs the weights by rho along the gradient, takes the gradient there, restores the weights and
    steps.
    """

    # norm of the perturbation, over all trainable parameters together
    rho: Annotated[float, Field(gt=0)] = 0.05

    def step(self, closure, chain, clock):
        loss = closure()
        norm = length(gradients(chain))
        if norm:
            climb = self.rho / norm
            with perturbed(chain, lambda group, slot, p: None if p.grad is None else climb * p.grad.float()):
                closure()
        chain.step(gradients(chain))
        return loss
