"""Prodigy's step: Adam without a learning rate, which estimates how far the weights have to go.

With d the estimate, m = b1 m + (1 - b1) d g and v = b2 v + (1 - b2) d^2 g^2, and the update is
d m / (sqrt(v) + d eps). The estimate is the largest that any step has seen of n / |s|_1, where n gathers
(d / d0) d <g, x0 - x> and s gathers (d / d0) d g, both decayed by sqrt(b2) a step: by convexity it does not
exceed the distance to the minimum (Mishchenko and Defazio, 2023). The recipe's learning rate multiplies the
step and is 1. Departs: each parameter group has an estimate of its own, as `split_groups` of other
implementations, so that groups are stepped one by one; no bias correction, as is the authors' default.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.transforms._base import Transform
from luthier.registry import Range, transform


@transform(
    paper="arXiv:2306.06101",
    use_when="you write a chain of your own: it is the step within optimizer `prodigy`.",
    costs="four fp32 numbers for each trainable parameter.",
    starting_rate="1.0: what it multiplies is the estimate.",
)
class Prodigy(Transform):
    """d m / (sqrt(v) + d eps), d an estimate of the distance to the minimum; with weight decay d w p."""

    rescales = True

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay rate of the mean
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # of the mean square; its root is the estimate's
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # added to the denominator
    d0: Annotated[float, Field(gt=0)] = 1e-6  # the estimate at first
    # what the estimate is multiplied by
    d_coef: Annotated[float, Field(gt=0), Range(0.5, 2.0, log=True)] = 1.0
    growth_rate: Annotated[float, Field(gt=1)] = math.inf  # what the estimate grows by in a step at most
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled, on matrices; multiplied by d, too

    def apply(self, grads, state, group, step):
        own = {slot: self.state_of(slot, state, group.params[slot]) for slot in grads}
        d = state.setdefault("d", self.d0)
        self.follow(grads, own, state, group.params, d)
        self.estimate(own, state)
        updates = {}
        for slot, tensors in own.items():
            root = tensors["v"].sqrt().add_(state["d"] * self.adam_epsilon)
            update = (tensors["m"] / root).mul_(d)
            param = group.params[slot]
            if self.weight_decay and param.ndim >= 2:
                update.add_(param, alpha=self.weight_decay * d)
            updates[slot] = update
        return updates

    def state_of(self, slot, state, param):
        """What belongs to one tensor, with where it began."""
        if slot not in state:
            zeros = {name: torch.zeros_like(param) for name in ("m", "v", "s")}
            state[slot] = {**zeros, "x0": param.detach().clone()}
        return state[slot]

    def follow(self, grads, own, state, params, d):
        """This step's gradients into the running means and into what the estimate is made of."""
        weight, decay = d / self.d0 * d, self.adam_beta2**0.5
        ahead = state.get("numerator", 0.0) * decay
        for slot, grad in grads.items():
            tensors = own[slot]
            way = tensors["x0"] - params[slot].detach()
            ahead += weight * float(torch.sum(grad * way, dtype=torch.float64))
            tensors["m"].mul_(self.adam_beta1).add_(grad, alpha=d * (1 - self.adam_beta1))
            tensors["v"].mul_(self.adam_beta2).addcmul_(grad, grad, value=d * d * (1 - self.adam_beta2))
            tensors["s"].mul_(decay).add_(grad, alpha=weight)
        state["numerator"] = ahead

    def estimate(self, own, state):
        """d for the next step: it never falls."""
        size = sum(float(tensors["s"].abs().sum(dtype=torch.float64)) for tensors in own.values())
        if not size:
            return
        now = self.d_coef * state["numerator"] / size
        highest = state["highest"] = max(state.get("highest", self.d0), now)
        if state["d"] == self.d0:
            state["d"] = max(state["d"], now)
        state["d"] = min(max(highest, state["d"]), state["d"] * self.growth_rate)
