"""The logarithm of a partition function, learned: log Z of what a prompt asks for, by a small network on
the state that predicts the first token.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import HIDDEN
from luthier.methods.roles._base import Part, Role, brought, width_of
from luthier.methods.roles.networks.part_whole import silent
from luthier.registry import Capability, role

LOG_PARTITION = Capability(
    "log_partition",
    says="a learned log Z of each prompt",
    advice="use `roles: {log_partition: log_partition}`",
)


@role(
    provides=[LOG_PARTITION],
    requires=[HIDDEN],
    use_when="objective `trajectory_balance` has one completion of a prompt (`log_z: learned`), or log Z"
    " itself is wanted.",
    costs="two small layers that train along.",
)
class LogPartition(Role):
    """state -> width -> log Z; it says 0 at first."""

    width: Annotated[int, Field(ge=1)] = 64  # of the hidden layer

    def parts(self, policy):
        head = LogZ(width_of(policy), self.width)
        return {"head": head.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "head")


class LogZ(Part):
    """value(policy, batch) -> [N] in fp32."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.layers = silent(features, width, 1)

    def value(self, policy, batch) -> Tensor:
        """[N] log Z of each sequence's prompt. The policy's layers do not learn from it."""
        first = policy.outputs(batch).hidden.detach()[batch.place == 0]
        return self.layers(first.float()).squeeze(-1)
