"""A critic as a linear head on the policy's own hidden states: what a state is expected to earn from here
on.

It says 0 at first, and trains along with the policy. It costs no network of its own; by default its error
does not reach the policy's layers, so that the critic cannot disturb what it judges.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.roles._base import CRITIC, Part, Role, brought, width_of
from luthier.registry import role


@role(
    provides=[CRITIC],
    requires=[HIDDEN],
    use_when="objective `ppo` needs a critic and there is no memory for a second network.",
    costs="one vector that trains along.",
)
class ValueHead(Role):
    """A linear layer on the state that predicts each token."""

    detach: bool = True  # keep the critic's error out of the policy's layers

    def parts(self, policy):
        head = Head(width_of(policy), self.detach)
        return {"head": head.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "head")


class Head(Part):
    """values(policy, batch) -> [T] in fp32."""

    def __init__(self, width: int, detach: bool):
        super().__init__()
        self.detach, self.value = detach, nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def values(self, policy, batch) -> Tensor:
        """[T] what is expected before each supervised token."""
        hidden = policy.outputs(batch).hidden
        if self.detach:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(hidden.float()).squeeze(-1)
