"""How large the gradient of the last supervised step was, against that at the end of the warm-up: the
probability that the next step is a supervised one, for stage `sasr`.

A large gradient says that the policy is far from the demonstrations, a small one that it has learned them.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.roles._base import Part, Role, brought
from luthier.registry import Capability, Range, role

SUPERVISED_SHARE = Capability(
    "supervised_share",
    says="how likely a supervised step is",
    advice="use `roles: {supervised_share: supervised_share}`",
)


@role(
    provides=[SUPERVISED_SHARE],
    paper="arXiv:2505.13026",
    row="sasr",
    use_when="stage `sasr` chooses between supervised and reinforced steps.",
    costs="a norm of the gradients after each supervised step.",
    covers="the warm-up, gradient norms of supervised steps and the probability made of them.",
    tests=["methods/stages/rollout/test_sasr.py::test_the_share_is_that_of_the_norms"],
)
class SupervisedShare(Role):
    """last / (last + gamma * warm): norms of the last supervised step and of the last one of the warm-up."""

    # how fast steps are handed over to reinforcement: at 0 never, at infinity (.inf) right after the warm-up
    gamma: Annotated[float, Field(ge=0), Range(0.25, 4.0, log=True)] = 1.0
    warmup: Annotated[int, Field(ge=1)] = 10  # first steps, all supervised

    def parts(self, policy):
        norms = Norms(policy.attached, self.gamma, self.warmup)
        return {"norms": norms.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "norms")


class Norms(Part):
    """The two norms, and whether this step is a supervised one; all in checkpoints."""

    warm: Tensor
    last: Tensor
    supervised: Tensor

    def __init__(self, tuned: Any, gamma: float, warmup: int):
        super().__init__()
        self.of = (tuned,)  # in a tuple: what is measured is no part of this
        self.gamma, self.warmup = gamma, warmup
        self.register_buffer("warm", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("supervised", torch.zeros(()))

    def share(self, step: int) -> float:
        """The probability that this step is a supervised one."""
        if step < self.warmup:
            return 1.0
        last, warm = float(self.last), float(self.warm)
        return last / (last + self.gamma * warm) if last else 0.0

    @torch.no_grad()
    def after_step(self, clock):
        if not self.supervised:
            return
        squares = [
            p.grad.float().square().sum() for p in self.of[0].parameters().values() if p.grad is not None
        ]
        self.last.fill_(float(sum(squares)) ** 0.5)
        if clock.step < self.warmup:
            self.warm.copy_(self.last)
