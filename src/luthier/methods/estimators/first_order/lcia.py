"""LCIA: an average of the trained weights whose inertia follows from how the loss bends, so that old tasks
stay while new ones are learned.

Beside the weights theta_t runs an average theta*_t = theta*_{t-1} + w_t (theta_t - theta*_{t-1}), from the
weights that the run starts from; at the last step the average takes their place. For each tensor w_t balances
what the new weights gain against what they lose: 2 (1 + |g_t|) / (|theta_t - theta*_{t-1}| |g_t - g_{t-1}|),
L1 norms, where the change of the gradient stands for the second derivative. Where that does not lie between 0
and 1, and at the first step, it is `fallback` (Qiao et al., 2024).

In a stream of tasks it belongs to the runs behind the first, which has nothing to keep: `plan: {name:
continual, later: {estimator: lcia}}`. Metrics during training are those of the weights that train. A run that
is stopped early ends with these as well.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    paper="arXiv:2410.10868",
    row="lcia",
    provides=[GRADIENT],
    use_when="a model goes on to another task and should lose little of those before it, without their rows.",
    costs="two copies of what trains, in fp32: the average and the last gradient.",
    starting_rate="that of the tuner.",
    covers="the moving average with the balance of plasticity and stability for each tensor, from the"
    " authors' formula with its fallback, and the average as the end of the task.",
    omits="new adapters for instructions unlike those before, and their choice by similarity; less forgetting"
    " than a fixed average is not shown here.",
    tests=[
        "methods/estimators/first_order/test_lcia.py::test_weights_of_the_average_are_those_of_the_formula",
        "methods/estimators/first_order/test_lcia.py::test_a_constant_weight_is_the_average_of_torch",
        "methods/estimators/first_order/test_lcia.py::test_the_end_lies_among_what_training_went_through",
    ],
)
class LCIA(Estimator):
    """Backprop, and an average of the weights that replaces them at the end."""

    fixed_tensors: ClassVar[bool] = True

    # weight of the new weights where the formula gives none
    fallback: Annotated[float, Field(ge=0, le=1)] = 0.01
    # a weight for all steps and tensors instead: a plain moving average
    constant: Annotated[float, Field(ge=0, le=1)] | None = None

    def step(self, closure, chain, clock):
        groups = chain.param_groups()
        for group in groups:
            averages = self.averages(chain, group.name)
            for slot, p in group.params.items():
                if slot not in averages:
                    averages[slot] = p.detach().float().clone()
        loss = closure()
        grads = gradients(chain)
        now = {name: {k: g.float().clone() for k, g in slots.items()} for name, slots in grads.items()}
        chain.step(grads)
        last = clock.step + 1 >= clock.total
        for group in groups:
            averages = self.averages(chain, group.name)
            earlier = chain.state[group.name].setdefault("lcia gradients", {})
            for slot, p in group.params.items():
                gradient = now.get(group.name, {}).get(slot)
                weight = self.weight(p.detach().float(), averages[slot], gradient, earlier.get(slot))
                averages[slot].lerp_(p.detach().float(), weight)
                if gradient is not None:
                    earlier[slot] = gradient
                if last:
                    with torch.no_grad():
                        p.copy_(averages[slot])
        return loss

    def averages(self, chain, name: str) -> dict[str, Tensor]:
        """Of a group's tensors, in the optimizer's state and so in checkpoints."""
        return chain.state.setdefault(name, {}).setdefault("lcia averages", {})

    def weight(self, p: Tensor, average: Tensor, gradient: Tensor | None, earlier: Tensor | None) -> float:
        """How far the average goes towards the weights p. gradient, earlier: of this step and the last; None
        where there was none.
        """
        if self.constant is not None:
            return self.constant
        if gradient is None or earlier is None:
            return self.fallback
        bend = float((p - average).abs().sum()) * float((gradient - earlier).abs().sum())
        if not bend > 0:
            return self.fallback
        weight = 2 * (1 + float(gradient.abs().sum())) / bend
        return weight if 0 < weight < 1 else self.fallback
