"""Elastic steps (InstaTune): sums the gradients of the full network and of sub-networks that are sampled at
each step.

The full network is trained on the objective without `distill`, sub-networks on all of it. With `objective:
sft + kl` and `roles: {reference: full_network}` they therefore learn the labels and the full network's
distribution. Requires tuner `elastic`.
"""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.tuners.pruned.elastic import ELASTIC
from luthier.registry import estimator


@estimator(
    paper="arXiv:2308.15609",
    row="instatune",
    requires=[ELASTIC],
    provides=[GRADIENT],
    use_when="tuner is `elastic`: the sub-networks are trained together with the full network.",
    costs="a forward and backward pass for the full network and for each of `samples` (and the"
    " smallest) sub-networks.",
    starting_rate="that of the tuner.",
)
class Elastic(Estimator):
    """One backward pass for the full network and for each sub-network."""

    samples: Annotated[int, Field(ge=0)] = 1  # sub-networks sampled in each step
    smallest: bool = True  # whether the smallest sub-network is trained in each step as well
    distill: str = "kl"  # objective term that only sub-networks are trained on

    def step(self, closure, chain, clock):
        attached: Any = chain.attached
        loss = closure(only=lambda place, name: name != self.distill)
        grads = [{name: {k: g.clone() for k, g in slots.items()} for name, slots in gradients(chain).items()}]
        shapes = [attached.draw(clock.rng("elastic", k)) for k in range(self.samples)]
        for shape in [*shapes, *([attached.smallest] if self.smallest else [])]:
            with attached.playing(shape):
                closure(only=lambda place, name: 1.0)
            grads.append(
                {name: {k: g.clone() for k, g in slots.items()} for name, slots in gradients(chain).items()}
            )
        names = {name for each in grads for name in each}
        total = {}
        for name in sorted(names):
            slots = [each[name] for each in grads if name in each]
            keys = {k for s in slots for k in s}
            total[name] = {
                k: reduce(lambda a, b: a + b, (s[k] for s in slots if k in s)) / len(grads)
                for k in sorted(keys)
            }
        chain.step(total)
        return loss
