"""Mixout: in each step a random share of the trained numbers stands at its initial value, as dropout has it
at zero.

The gradient is computed at W' = W0 + m (W - W0) / (1 - p), with m zero where a number stands at its initial
value W0, so that W' is W on average; the numbers that stand there get no gradient. It draws fine-tuning
towards the pretrained weights, and runs on few rows fail less often. Evaluation is without it. The paper
mixes the weights of some modules in place of dropout on their inputs; here all trained tensors are mixed, and
dropout is as the network has it. With tuner `full` this is the paper's mixout(W0); with another tuner W0 is
where its tensors start.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients, perturbed
from luthier.registry import Range, estimator


@estimator(
    paper="arXiv:1909.11299",
    row="stable-ft-biomedical",
    provides=[GRADIENT],
    use_when="full fine-tuning on a few hundred rows fails with some seeds.",
    costs="one forward and backward pass, a random draw for each trainable number, and two copies of them.",
    starting_rate="that of the tuner.",
    covers="the gradient is that of the mixed weights, zero where a number stands at its start; the "
    "mixed weights are the weights on average; on a quadratic it ends nearer to the start.",
    omits="the choice of modules that are mixed in place of dropout: all trained tensors are.",
    tests=[
        "methods/estimators/first_order/test_mixout.py::test_mixout_is_the_gradient_of_the_mixed_weights",
        "methods/estimators/first_order/test_mixout.py::test_mixout_is_unbiased",
        "methods/estimators/first_order/test_mixout.py::test_mixout_stays_nearer_to_the_start",
    ],
)
class Mixout(Estimator):
    """Backprop at weights that are mixed with their initial values."""

    fixed_tensors: ClassVar[bool] = True

    # share of the numbers that stand at their initial value (the paper's 0.7 to 0.9 are for BERT-large)
    p: Annotated[float, Field(ge=0, lt=1), Range(0.1, 0.9)] = 0.7

    def step(self, closure, chain, clock):
        start = {}
        for group in chain.param_groups():
            own = chain.state.setdefault(group.name, {}).setdefault("mixout", {})
            for slot, p in group.params.items():
                if slot not in own:
                    own[slot] = p.detach().clone()
            start[group.name] = own

        def aside(group, slot, p):
            scale = self.scale(clock, group.name, slot, p)
            return (p.data - start[group.name][slot]).float() * (scale - 1)

        with perturbed(chain, aside):
            loss = closure()
        mixed = {}
        for name, slots in gradients(chain).items():
            mixed[name] = {k: g * self.scale(clock, name, k, g).to(g.dtype) for k, g in slots.items()}
        chain.step(mixed)
        return loss

    def scale(self, clock, group: str, slot: str, like: Tensor) -> Tensor:
        """What the distance of each number from its start is multiplied by: 0, or 1 / (1 - p). The same each
        time within a step.
        """
        free = torch.rand(like.shape, generator=clock.rng("mixout", group, slot)) >= self.p
        return free.to(like.device).float() / (1 - self.p)
