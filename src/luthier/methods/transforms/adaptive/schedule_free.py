"""Schedule-free AdamW's step: an average of all weights so far takes the place of a falling learning rate.

Of three sequences the gradients are taken at y, z makes AdamW's steps without momentum, and x is the average
of all z: z' = z - rate d with d = g / (sqrt(v) + eps) + w y, x' = (1 - c) x + c z' and y' = (1 - beta1) z' +
beta1 x', where c is this step's share of the squares of the largest rate so far (Defazio et al., 2024). The
network holds y while it trains, and x after the last step. One tensor a = z - y is kept beside v: y moves by
c a - rate d (1 - beta1 (1 - c)), and a becomes (1 - c) (a - rate beta1 d).

Departs: evaluations during the run, and a run that is stopped early, are of y, which is near x; the weight
decay is that of matrices alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.transforms._base import Transform
from luthier.registry import INTERNAL, transform


@transform(
    paper="arXiv:2405.15682",
    use_when="you write a chain of your own: it is the step within optimizer `schedule_free`; it comes last,"
    " and not inside of another transform.",
    costs="two fp32 numbers for each trainable parameter.",
    starting_rate="one to ten times AdamW's, with `lr_scheduler_type: constant_with_warmup`.",
)
class ScheduleFree(Transform):
    """Steps of y, where gradients are taken; the last step ends at the average x."""

    rescales = True

    # how far the gradients are taken toward the average: 0 at z, 1 at x
    adam_beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # decay rate of the mean square
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8  # added to the denominator
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled, at y, on matrices
    # the step that is made now; filled in where it is made
    now: Annotated[Any, INTERNAL] = None

    def bind(self, attached):
        return replace(self, now={"rate": None, "last": False})

    def begin(self, rate, last):
        self.now.update(rate=rate, last=last)

    def apply(self, grads, state, group, step):
        rate, updates = self.now["rate"], {}
        if rate is None:
            raise RecipeError(
                "transform 'schedule_free' must know the learning rate, and is inside of another method here;"
                " name it in the chain itself, or take adam there"
            )
        if not rate:
            return {slot: torch.zeros_like(grad) for slot, grad in grads.items()}
        share = self.share(state, rate)
        for slot, grad in grads.items():
            if slot not in state:
                state[slot] = {"v": torch.zeros_like(grad), "ahead": torch.zeros_like(grad)}
            v, ahead = state[slot]["v"], state[slot]["ahead"]
            d = self.direction(grad, v, group.params[slot], step)
            update = d * (1 - self.adam_beta1 * (1 - share)) - ahead * (share / rate)
            ahead.sub_(d, alpha=rate * self.adam_beta1).mul_(1 - share)
            if self.now["last"]:  # from y to the average
                update.add_(ahead, alpha=(1 / self.adam_beta1 - 1) / rate)
            updates[slot] = update
        return updates

    def share(self, state: dict, rate: float) -> float:
        """Of this step in the average of a group."""
        state["highest"] = max(state.get("highest", 0.0), rate)
        weight = state["highest"] ** 2
        state["weights"] = state.get("weights", 0.0) + weight
        return weight / state["weights"]

    def direction(self, grad: Tensor, v: Tensor, param: Tensor, step: Any) -> Tensor:
        """AdamW's step without momentum, before the learning rate."""
        v.mul_(self.adam_beta2).addcmul_(grad, grad, value=1 - self.adam_beta2)
        d = grad / ((v / (1 - self.adam_beta2**step)).sqrt_().add_(self.adam_epsilon))
        if self.weight_decay and param.ndim >= 2:
            d.add_(param, alpha=self.weight_decay)
        return d
