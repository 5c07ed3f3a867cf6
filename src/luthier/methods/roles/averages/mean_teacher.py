"""A mean teacher: the policy with an exponential moving average of its trainable parameters, updated after
every step. It gets no gradient.

average <- momentum * average + (1 - momentum) * parameters, starting at the policy's initial values. Frozen
parameters take no additional memory.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.roles._base import Role, brought
from luthier.methods.roles.averages._average import Averaged
from luthier.registry import role


@role(
    paper="arXiv:1703.01780",
    use_when="a steadier teacher is wanted without another model: an average of the policy over steps.",
    costs="a copy of the trainable parameters, and a forward pass where it is used.",
)
class MeanTeacher(Role):
    """The exponential moving average of the policy."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996  # share of the average that is kept at each step

    def parts(self, policy):
        return {"average": Running(policy.attached, self.momentum)}

    def play(self, name, policy):
        average = brought(policy, name, "average")
        return policy.as_role(name, lambda: policy.attached.using(average.tensors()))


class Running(Averaged):
    """Over all steps, recent ones more."""

    def __init__(self, tuned: Any, momentum: float):
        super().__init__(tuned)
        self.momentum = momentum

    @torch.no_grad()
    def after_step(self, clock):
        for name, p in self.trained().items():
            self.average[name].lerp_(p.float(), 1 - self.momentum)
