"""A projection head: two layers between a network's features and the space in which they are compared by a
contrastive loss.

What the loss makes alike there need not be alike in the features themselves, which stay free to tell more. It
trains along with the policy and is not part of what is saved for use.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from luthier.methods.roles._base import Part, Role, brought, width_of
from luthier.registry import Capability, role

PROJECTION = Capability(
    "projection",
    says="a projection head for a contrastive loss",
    advice="use `roles: {projection: projection}`",
)


@role(
    provides=[PROJECTION],
    use_when="objective `core_tuning` compares projected features (`projected: true`).",
    costs="two small layers that train along.",
)
class Projection(Role):
    """features -> d -> ReLU -> `width`."""

    width: Annotated[int, Field(ge=1)] = 256  # width of what is compared

    def parts(self, policy):
        head = ProjectionHead(width_of(policy), self.width)
        return {"head": head.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "head")


class ProjectionHead(Part):
    """[N, d] -> [N, width], in fp32."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(features, features), nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).relu())
