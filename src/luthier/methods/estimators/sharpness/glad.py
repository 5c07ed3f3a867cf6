"""GLAD's regulariser: mixes the gradient with the gradient at a point uphill, so that training ends where the
loss is flat.

The step is (1 - alpha) g0 + alpha g1, with g0 the gradient and g1 the gradient at theta + rho g0 / |g0|:
alpha 0 is plain backprop, alpha 1 is SAM, and in between the gradient norm is penalised with strength alpha *
rho (Zhao et al., 2202.03599). The paper's own perturbation rule could not be verified; this is the family it
belongs to. Both passes use the same dropout masks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients, length, perturbed
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:2507.13089",
    row="glad",
    provides=[GRADIENT],
    use_when="you want part of SAM's effect: `alpha` mixes its gradient with the plain one.",
    costs="two forward and backward passes a step, and a copy of the trainable parameters.",
    starting_rate="that of the tuner.",
    covers="gradients mixed with those of a point uphill, on whatever a tuner trains.",
    omits="the paper's own perturbation rule, which could not be verified; CLIP and its scores on base and"
    " new classes.",
    tests=[
        "methods/estimators/sharpness/test_glad.py"
        "::test_glad_without_its_share_is_backprop_and_with_all_of_it_sam",
        "methods/estimators/sharpness/test_glad.py::test_glad_on_a_quadratic_is_its_closed_form",
        "methods/estimators/sharpness/test_glad.py::test_it_ends_where_the_loss_is_flatter_than_that_of_lora",
    ],
)
class GLAD(Estimator):
    """A mix of the gradient here and the gradient at the perturbed point."""

    # norm of the perturbation, over all trainable parameters together
    rho: Annotated[float, Field(gt=0), Range(0.005, 0.5, log=True)] = 0.05
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of the gradient at the perturbed point

    @torch.no_grad()
    def step(self, closure, chain, clock):
        with torch.enable_grad():
            loss = closure()
        if not self.alpha:
            chain.step(gradients(chain))
            return loss
        here = {name: {k: g.clone() for k, g in slots.items()} for name, slots in gradients(chain).items()}
        norm = length(here)
        if norm:
            climb = self.rho / norm
            with (
                perturbed(chain, lambda group, slot, p: None if p.grad is None else climb * p.grad.float()),
                torch.enable_grad(),
            ):
                closure()
            for name, slots in gradients(chain).items():
                for k, g in slots.items():
                    here[name][k] = torch.lerp(here[name][k], g, self.alpha)
        chain.step(here)
        return loss
