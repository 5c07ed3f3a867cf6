"""Sophia's step: momentum divided by the curvature of each number, no further than one learning rate.

The curvature h is measured by estimator `gauss_newton`, every few steps. Where none has been measured, or it
is small, the step is the momentum's sign, as Lion's without its second share.
"""

from typing import ClassVar

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:2305.14342",
    use_when="you write a chain of your own with estimator `gauss_newton`.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="that of `lion`, up to AdamW's.",
    rate_factor=0.3,
    covers="the clipped step by momentum and curvature.",
    tests=["methods/optimizers/first_order/test_sophia.py::test_the_step_by_hand"],
)
class Sophia(Each):
    """clip(m / max(gamma h, eps), -1, 1), m the mean of gradients."""

    pointwise = True
    rescales = True
    curvature: ClassVar[str] = "h"  # entry of its state that `gauss_newton` fills

    beta1: float = 0.96  # decay rate of the momentum
    gamma: float = 0.05  # scale of the curvature: the smaller, the more numbers take a whole step
    eps: float = 1e-12  # least divisor

    def init(self, like):
        return {"m": like.new_zeros(like.shape), "h": like.new_zeros(like.shape)}

    def update(self, grad, state, param, step):
        state["m"].lerp_(grad, 1 - self.beta1)
        return (state["m"] / (self.gamma * state["h"]).clamp(min=self.eps)).clamp(-1, 1)
