"""Code books: each weight is coded as the nearest of a few fixed levels, times the largest magnitude of its
block.

Levels and layout are those of bitsandbytes: blocks run along the rows of [out, in]; with double quantization
the blocks' magnitudes, minus their mean, are stored in 8 bits of a dynamic map, in blocks of 256.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import RecipeError
from luthier.kernels import codebook
from luthier.methods.quantizers._base import Codes, Quantizer
from luthier.registry import family

SECOND = 256  # magnitudes of a block of the second level


@cache
def normal_float(bits: int) -> tuple[float, ...]:
    """The levels of NF-b: quantiles of N(0, 1) on either side of an exact zero, scaled to end at -1 and 1."""
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(1 - tail, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(1 - tail, 0.5, half, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return tuple((levels / above[0]).float().tolist())


@cache
def dynamic_map() -> Tensor:
    """[256] numbers of -1 to 1, denser toward zero: seven decades, each with twice the fractions of the one
    below.
    """
    some = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10.0 ** (i - 6)) * (ends[:-1] + ends[1:]) / 2
        some += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(some), dtype=torch.float32)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The place of the nearest level of each number."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def magnitudes(blocks: Tensor) -> Tensor:
    """[n, block] -> [n]."""
    return blocks.abs().amax(1)


@family
class CodeBook(Quantizer):
    """Family: 16 levels, two codes in a byte."""

    levels: ClassVar[tuple[float, ...]]

    block_size: int = 64  # weights that share a scale
    double_quant: bool = True  # quantize the scales to 8 bits, too (bnb_4bit_use_double_quant)

    def __post_init__(self):
        if self.block_size < 2 or self.block_size % 2:
            raise RecipeError(f"block_size: {self.block_size} must be an even number of weights")

    def quantize(self, W, stats=None):
        flat = W.reshape(-1).float()
        blocks = F.pad(flat, (0, -len(flat) % self.block_size)).view(-1, self.block_size)
        scale = magnitudes(blocks)
        inverse = 1.0 / scale.clamp(min=1e-38)
        book = torch.tensor(self.levels, dtype=torch.float32, device=W.device)
        codes = torch.empty(blocks.shape, dtype=torch.uint8, device=W.device)
        for i in range(0, len(blocks), 2**14):  # in pieces: the places come in 32 bits
            codes[i : i + 2**14] = nearest(blocks[i : i + 2**14] * inverse[i : i + 2**14, None], book)
        return {
            "weight": codebook.pack(codes.flatten()),
            **(squeeze(scale) if self.double_quant else {"absmax": scale}),
        }

    def dequantize(self, codes, shape, dtype):
        scale = unsqueeze(codes) if "nested_absmax" in codes else codes["absmax"]
        flat = codebook.expand(codes["weight"], self.levels, scale, dtype)
        return flat[: shape[0] * shape[1]].view(shape)

    def bits(self, shape):
        n = shape[0] * shape[1]
        blocks = -(-n // self.block_size)
        scales = 8 * blocks + 32 * (-(-blocks // SECOND) + 1) if self.double_quant else 32 * blocks
        return (4 * blocks * self.block_size + scales) / n


def squeeze(scale: Tensor) -> Codes:
    """[n] magnitudes -> their 8-bit codes, the magnitude of each 256 of them, and their mean."""
    mean = scale.mean()
    blocks = F.pad(scale - mean, (0, -len(scale) % SECOND)).view(-1, SECOND)
    top = magnitudes(blocks)
    codes = nearest(blocks / top.clamp(min=1e-38)[:, None], dynamic_map().to(scale.device))
    return {
        "absmax": codes.flatten()[: len(scale)].to(torch.uint8),
        "nested_absmax": top,
        "nested_offset": mean[None],
    }


def unsqueeze(codes) -> Tensor:
    """The way back."""
    table = dynamic_map().to(codes["absmax"].device)
    levels = table.index_select(0, codes["absmax"].int())
    each = codes["nested_absmax"].repeat_interleave(SECOND)[: len(levels)]
    return levels.mul_(each).add_(codes["nested_offset"])
