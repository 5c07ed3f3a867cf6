"""Gradient dropout: drops gradient entries at random where the task loss and a regulariser (a KL to the base
model) disagree in sign.

With a the gradient of all terms but `gate`, and b that of `gate` (weight included), an entry is kept with
probability (1 + sgn(a) (a + b) / (|a| + |b|)) / 2: always where b has the same sign, and less likely the
larger b is where it has the opposite sign. b only gates and is not added. Part of R-AMT, which uses it on
masks: `objective: sft + kl`, with the base model as reference. Two backward passes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.registry import estimator


@estimator(
    paper="arXiv:2307.15049",
    row="r-amt",
    provides=[GRADIENT],
    use_when="a regulariser such as a KL to the base should veto parts of the task's gradient rather"
    " than be added to it.",
    costs="two backward passes a step.",
    starting_rate="that of the tuner.",
    covers="gradient dropout by a term that gates.",
    tests=[
        "methods/estimators/first_order/test_gradient_dropout.py::test_gradient_dropout",
    ],
)
class GradientDropout(Estimator):
    """One term of the objective decides which entries of the others' gradient are used."""

    gate: str = "kl"  # the objective term that gates
    # share of the gradient that is gated; the rest passes unchanged
    blend: Annotated[float, Field(ge=0, le=1)] = 1.0

    def suits(self, objective):
        names = [o.name for _, o in objective.terms()]
        if self.gate not in names or set(names) == {self.gate}:
            raise RecipeError(
                f"estimator 'gradient_dropout' needs an objective with a term '{self.gate}' and"
                f" one more, such as `sft + {self.gate}`, not {' + '.join(names)}"
            )

    def step(self, closure, chain, clock):
        closure(only=lambda place, name: name == self.gate)
        gates = {group: {k: g.clone() for k, g in slots.items()} for group, slots in gradients(chain).items()}
        loss = closure(only=lambda place, name: name != self.gate)
        gated = {}
        for group, slots in gradients(chain).items():
            gated[group] = {
                k: self.dropped(a, gates.get(group, {}).get(k), clock.rng("gradient_dropout", group, k))
                for k, a in slots.items()
            }
        chain.step(gated)
        return loss

    def dropped(self, a: Tensor, b: Tensor | None, rng: torch.Generator) -> Tensor:
        """a, where it is kept; b None: nothing speaks against it."""
        if b is None:
            return a
        draw = torch.rand(a.shape, generator=rng).to(a.device)
        return a * ((1 - self.blend) + self.blend * (chance(a, b) > draw).to(a.dtype))


def chance(a: Tensor, b: Tensor) -> Tensor:
    """The probability with which each entry of a is kept."""
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8)) / 2
