"""RTN, round to nearest: each group of weights is mapped to 2**bits evenly spaced numbers between its
smallest and its largest.

The simplest quantizer and the baseline for all others. Departs from GPTQ's form of it: the minimum of a group
is stored as it is, not as a whole number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.quantizers._base import QUANTIZED_WEIGHTS, Codes, Quantizer
from luthier.methods.quantizers.normal_float._bits import pack, unpack
from luthier.registry import quantizer


@quantizer(
    row="llm-compression-survey",
    provides=[QUANTIZED_WEIGHTS],
    use_when="you want the plainest quantization: as a baseline, or as the base of `pv_tuning`. It"
    " reads no rows.",
    costs="`bits_per_weight` bits plus 32 bits for each group.",
    covers="round to nearest: eight bits keep perplexity, two do not.",
    tests=[
        "methods/quantizers/uniform/test_rtn.py::test_round_to_nearest_by_its_formula",
        "methods/quantizers/uniform/test_rtn.py::test_eight_bits_are_enough_and_two_are_not",
    ],
)
class RTN(Quantizer):
    """Round to nearest, per group of a row's weights."""

    continuous: ClassVar[tuple[str, ...]] = ("scale", "low")

    bits_per_weight: Annotated[int, Field(ge=1, le=8)] = 4  # bits per code
    group_size: int = 64  # weights that share a scale and a minimum, 16 bits each; groups run along the rows

    symmetric: bool = False  # groups are centred on 0, which is then one of the numbers

    def __post_init__(self):
        if self.group_size < 2:
            raise RecipeError(f"group_size: {self.group_size} must be at least 1 (or -1 for a whole row)")

    def quantize(self, W, stats=None):
        scale, low = self.grid(W)
        return self.nearest(W, stored(scale, low, unit_of(scale, low)))

    def grid(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """[out, in] -> [groups] the step between numbers of each group, and its smallest number."""
        return self.bounds(self.groups(W))

    def bounds(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """[groups, group_size] -> [groups] steps, and smallest numbers."""
        steps = 2**self.bits_per_weight - 1
        if self.symmetric:
            step = groups.abs().amax(1) / (steps / 2)
            return step, step * -(2 ** (self.bits_per_weight - 1))
        low, high = groups.amin(1), groups.amax(1)
        return (high - low) / steps, low

    def groups(self, W):
        """[out, in] -> [groups, group_size], the last filled up with what it ends with."""
        flat = W.reshape(1, -1).float()
        return F.pad(flat, (0, -flat.shape[1] % self.group_size), mode="replicate").view(-1, self.group_size)

    def nearest(self, W, codes):
        scale, low = read(codes)
        places = (self.groups(W) - low[:, None]) / scale.clamp(min=1e-30)[:, None]
        places = places.round().clamp(0, 2**self.bits_per_weight - 1)
        return {**codes, "weight": pack(places.to(torch.uint8), self.bits_per_weight)}

    def dequantize(self, codes, shape, dtype):
        scale, low = read(codes)
        places = unpack(codes["weight"], self.bits_per_weight, len(scale) * self.group_size).view(
            len(scale), -1
        )
        weights = torch.addcmul(low[:, None], places.float(), scale[:, None])
        return weights.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)

    def bits(self, shape):
        groups = -(-shape[0] * shape[1] // self.group_size)
        return groups * (self.group_size * self.bits_per_weight + 32) / (shape[0] * shape[1])


def stored(scale: Tensor, low: Tensor, unit: Tensor | None) -> Codes:
    """Scales and minima in 16 bits, as multiples of the unit where there is one."""
    if unit is None:
        return {"scale": scale.to(torch.float16), "low": low.to(torch.float16)}
    return {"scale": (scale / unit).to(torch.float16), "low": (low / unit).to(torch.float16), "unit": unit}


def unit_of(scale: Tensor, low: Tensor) -> Tensor | None:
    """A power of two for the scales and minima of a weight that would lose digits in 16 bits, where the
    smallest with all of them is 6.1e-5 and the largest 65504; None where they lose none.
    """
    steps, half = scale[scale > 0], torch.finfo(torch.float16)
    largest = torch.maximum(scale.max(), low.abs().max())
    if not len(steps) or (float(steps.min()) >= half.smallest_normal and float(largest) <= half.max):
        return None
    return torch.exp2(largest.log2().floor())


def read(codes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and minima in fp32."""
    scale, low = codes["scale"].float(), codes["low"].float()
    if "unit" not in codes:
        return scale, low
    return scale * codes["unit"], low * codes["unit"]
