"""Quantized side tuning: a narrow network beside the frozen one reads the hidden states of all its layers,
and training goes through the narrow one alone.

Hidden states h_i of width d come down to width d / r by a product of two narrow matrices and a norm, D_i. The
side state is g_0 = D_0(h_0), then g_i = Block_i((1 - z_i) D_i(h_i) + z_i g_(i-1)) with z_i = sigmoid(zeta_i).
After the last layer h = s h_N + (1 - s) U g_N goes into the network's own last norm and head. Nothing of the
base needs a gradient, so none of its activations are stored, and its weights may be 4-bit codes
(`quantization: nf4`).

Departs: a block is a gated feed-forward block of widths divided by r and has no attention of its own, since
all that it reads has been attended to already; s is one trained number that starts at exactly 1 (the paper: a
sigmoid), so that training starts at the base model; h is put together before the last norm.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._layerwise import Layerwise
from luthier.registry import Choices, Range, tuner


@tuner(
    example={"reduction_factor": 4, "rank": 2},
    row="quantized-side-tuning",
    provides=[DISABLE_ADAPTER],
    contract={"modules_of_every_kind": "a side network is beside whole layers, at their last matrices"},
    use_when="memory for activations is what is short: the base may be quantized, and no gradient goes"
    " through it at all.",
    costs="a network of width d / `reduction_factor` beside the frozen one, in training and in inference (not"
    " mergeable); backward goes through that alone.",
    starting_rate="the paper takes 2e-4, and 1e-4 for chat.",
    default_rate=2e-4,
    covers="downsampling by two narrow matrices or by pooling, gates of each layer, the side network over a"
    " quantized base, the output mixed with the base's own; no gradient and no stored activation in the"
    " base.",
    omits="attention inside the side network; its measurements on large models.",
    tests=[
        "methods/tuners/side/test_quantized_side.py::test_the_side_network_is_the_formula",
        "methods/tuners/side/test_quantized_side.py::test_nothing_of_the_base_is_in_the_graph",
        "methods/tuners/side/test_quantized_side.py::test_over_a_quantized_base_it_starts_as_that",
        "methods/tuners/side/test_quantized_side.py::test_numbers_are_the_formula",
    ],
)
class QuantizedSideTuning(Layerwise):
    """A narrow network beside the frozen layers."""

    # width of the network divided by that of the side network
    reduction_factor: Annotated[float, Field(ge=1), Choices(4, 8, 16, 32)] = 16
    # how hidden states come down to that width: trained matrices of `rank`, or averages or maxima of
    # neighbouring channels, without weights
    downsample: Literal["low_rank", "average_pool", "max_pool"] = "low_rank"
    rank: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # inner width of the matrices

    def narrow(self, width: int) -> int:
        """The side network's width for one of the base."""
        return max(1, round(width / self.reduction_factor))

    def init(self, W):
        width, k = W.shape[0], self.narrow(W.shape[0])
        inner = self.narrow(W.shape[1])  # the layer's last matrix reads what its feed-forward block computes
        tensors = {
            **self.down("", width),
            "zeta": torch.full((k,), 0.5),
            "block_norm": torch.ones(k),
            "gate": torch.randn(inner, k) / k**0.5,
            "up": torch.randn(inner, k) / k**0.5,
            "out": torch.randn(k, inner) / inner**0.5,
        }
        if self.first:
            tensors |= self.down("start_", width)
        if self.last:
            tensors |= {"U": torch.randn(width, k) / k**0.5, "mix": torch.ones(1)}
        return tensors

    def down(self, name: str, width: int) -> dict[str, Tensor]:
        """The tensors of one D: from `width`."""
        k = self.narrow(width)
        tensors = {f"{name}norm": torch.ones(k), f"{name}norm_bias": torch.zeros(k)}
        if self.downsample == "low_rank":
            tensors[f"{name}A"] = torch.randn(self.rank, width) / width**0.5
            tensors[f"{name}B"] = torch.randn(k, self.rank) / self.rank**0.5
        return tensors

    def reduced(self, h: Tensor, name: str, p) -> Tensor:
        """D(h): [..., width] -> [..., k], with the tensors of this name."""
        norm, bias = getattr(p, f"{name}norm"), getattr(p, f"{name}norm_bias")
        h = h.detach()
        if self.downsample == "low_rank":
            low = F.linear(F.linear(h, getattr(p, f"{name}A")), getattr(p, f"{name}B"))
        else:
            pool = F.adaptive_avg_pool1d if self.downsample == "average_pool" else F.adaptive_max_pool1d
            low = pool(h.reshape(-1, 1, h.shape[-1]), len(norm)).reshape(*h.shape[:-1], -1)
        return F.layer_norm(low, norm.shape, norm, bias)

    def after_layer(self, entering, answer, carried, p):
        if carried is None:
            carried = self.reduced(entering, "start_", p)
        z = p.zeta.sigmoid()
        g = (1 - z) * self.reduced(answer, "", p) + z * carried
        x = F.rms_norm(g, g.shape[-1:], p.block_norm, 1e-6)
        g = g + F.linear(F.silu(F.linear(x, p.gate)) * F.linear(x, p.up), p.out)
        if not self.last:
            return None, g
        return p.mix * answer.detach() + (1 - p.mix) * F.linear(g, p.U), g
