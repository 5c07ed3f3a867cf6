"""Bottleneck adapters: two small layers with a nonlinearity between them. They cannot be merged into a
weight.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.tuners._delta import Delta
from luthier.registry import Choices, family

# what leaves attention
ATTENTION = r"o_proj|out_proj|attn\.c_proj|attention\.output\.dense|attention\.dense|self_attention\.dense"
Activation = Literal["relu", "gelu", "silu", "tanh"]
# what leaves the feed-forward part
FFN = r"down_proj|mlp\.c_proj|fc2|layer\.\d+\.output\.dense|dense_4h_to_h|mlp\.c_fc2|wo"


def pair(width: int, k: int, out_: int, name: str = "") -> dict[str, Tensor]:
    """The tensors of one bottleneck: from width to k, from k to out_, where up starts at zero."""
    tensors = {
        "down": torch.randn(k, width) * 0.02,
        "down_bias": torch.zeros(k),
        "up": torch.zeros(out_, k),
        "up_bias": torch.zeros(out_),
    }
    return {f"{name}{part}": t for part, t in tensors.items()}


def through(
    h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, non_linearity: str
) -> Tensor:
    """up(f(down(h)))"""
    f = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[non_linearity]
    return F.linear(f(F.linear(h, down, down_bias)), up, up_bias)


NARROWER = Choices(2, 4, 8, 16, 32, 64)  # times; what a search goes over


@family
class Bottleneck(Delta):
    """Family: up(f(down(h))), down to width / reduction_factor; up starts at zero."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    parallel: ClassVar[bool] = False  # h is what the module reads; else what it says

    # width of h divided by that of the bottleneck
    reduction_factor: Annotated[float, Field(ge=1), NARROWER] = 16
    non_linearity: Activation = "relu"  # nonlinearity f

    def widths(self, W: Tensor) -> tuple[int, int]:
        """Of h, and of the bottleneck."""
        width = W.shape[1 if self.parallel else 0]
        return width, max(1, round(width / self.reduction_factor))

    def init(self, W):
        return pair(*self.widths(W), W.shape[0])

    def maps(self, p) -> tuple[Tensor, Tensor]:
        """down [k, width] and up [out, k]."""
        return p.down, p.up

    def forward(self, x, y, p, layer):
        down, up = self.maps(p)
        return y + through(x if self.parallel else y, down, p.down_bias, up, p.up_bias, self.non_linearity)

    def weight(self, W: Tensor, p) -> Tensor:
        raise NotImplementedError
