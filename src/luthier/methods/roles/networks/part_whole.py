"""Two heads between a whole and its parts: one composes the embeddings of the parts into the whole's, the
other decomposes it.

Both start with the simplest answer, the mean of the parts and the whole itself for each part, and learn a
correction to it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from luthier.methods.roles._base import Part, Role, brought, width_of
from luthier.registry import Capability, role

PART_HEADS = Capability(
    "part_heads",
    says="heads that compose parts into a whole and take it apart",
    advice="use `roles: {part_heads: part_whole, teacher: mean_teacher}`",
)


@role(
    provides=[PART_HEADS],
    use_when="objective `adam_v2` needs it.",
    costs="two small heads that train along.",
)
class PartWhole(Role):
    """A composer and a decomposer, trained with the policy."""

    parts_of_whole: Annotated[int, Field(ge=2)] = 2  # number of parts of a whole
    trained: bool = True  # false: fixed heads, the mean of the parts, and the whole for each part

    def parts(self, policy):
        heads = Heads(width_of(policy), self.parts_of_whole, self.trained)
        return {"heads": heads.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "heads")


class Heads(Part):
    """compose: [N, m, d] -> [N, d]. decompose: [N, d] -> [N, m, d]."""

    def __init__(self, width: int, m: int, trained: bool = True):
        super().__init__()
        self.m, self.trained = m, trained
        if trained:
            self.up, self.down = silent(m * width, 2 * width, width), silent(width, 2 * width, m * width)

    def compose(self, parts: Tensor) -> Tensor:
        return parts.mean(1) + (self.up(parts.flatten(1)) if self.trained else 0)

    def decompose(self, whole: Tensor) -> Tensor:
        same = whole[:, None].expand(-1, self.m, -1)
        return same + self.down(whole).view_as(same) if self.trained else same


def silent(wide: int, inner: int, out: int) -> nn.Sequential:
    """Two layers that say zero at first."""
    last = nn.Linear(inner, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(wide, inner), nn.GELU(), last)
