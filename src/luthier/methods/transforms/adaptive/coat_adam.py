"""COAT's step: Adam with both moments in one byte each (fp8 E4M3), stretched over the range of that format.

Moments are kept in groups of 128 neighbouring numbers. A number x of a group is stored as sign(x) (|x| /
c)^k, divided by a scale: c is the geometric mean of the largest and the smallest of the group, and the power
k widens what lies between them to the range of E4M3 (or, where it is wider, narrows it), so that its few bits
are all used. The step itself is computed in fp32 and rounded when it is stored. Departs: zeros stay zero and
do not count as the smallest of their group; k is at most 16; activations stay as they are.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Each
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.registry import transform

LARGEST = 448.0  # of E4M3
RANGE = LARGEST**2 / 2  # between its largest and its smallest normal number, by the paper
STRONGEST = 16.0  # no group is stretched by more


@transform(
    paper="arXiv:2410.19313",
    row="coat",
    use_when="AdamW's state does not fit and its steps should stay what they are.",
    costs="two bytes for each trainable parameter, and 24 for each group of 128; some time for rounding.",
    starting_rate="AdamW's.",
    covers="moments in E4M3 by groups, stretched; a smaller error than without; groups of one value"
    " exactly; a loss as with moments in fp32.",
    omits="activations in fp8, which need a GPU's kernels.",
    tests=[
        "methods/transforms/adaptive/test_coat_adam.py::test_stretching_makes_the_error_smaller",
        "methods/transforms/adaptive/test_coat_adam.py::test_a_power_of_one_is_plain_scaling",
        "methods/transforms/adaptive/test_coat_adam.py::test_groups_of_one_value_are_exact",
        "methods/transforms/adaptive/test_coat_adam.py::test_a_tiny_language_model_learns_as_with_fp32_moments",
    ],
)
class COATAdam(Each):
    """Adam, its state in fp8 with dynamic range expansion."""

    rescales = True

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator
    group_size: Annotated[int, Field(ge=2)] = 128  # numbers that share scale and power
    expand: bool = True  # stretch each group over the range of the format; false: scale it only

    def init(self, like):
        state = {}
        for name in ("m", "v"):
            state |= self.stored(name, torch.zeros_like(like))
        return state

    def update(self, grad, state, param, step):
        moments = {name: self.restored(name, state) for name in ("m", "v")}
        adam = Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon)
        update = adam.update(grad, moments, param, step)
        for name, value in moments.items():
            for key, tensor in self.stored(name, value).items():
                state[key].copy_(tensor)
        return update

    def seed(self, state, entries, gradients):
        moments = {name: self.restored(name, state) for name in ("m", "v")}
        adam = Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2)
        steps = adam.seed(moments, entries, gradients)
        for name, value in moments.items():
            for key, tensor in self.stored(name, value).items():
                state[key].copy_(tensor)
        return steps

    def restored(self, name: str, state: dict) -> Tensor:
        """A moment in fp32."""
        codes, scale, power, center = (state[f"{name}{part}"] for part in PARTS)
        return restored(codes, scale, power, center, self.group_size)

    def stored(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """What is kept of a moment."""
        parts = rounded(value, self.group_size, self.expand)
        return {f"{name}{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}


PARTS = ("", "_scale", "_power", "_center")


def rounded(x: Tensor, group_size: int, expand: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x -> codes of its shape (the bytes of E4M3), and scale, power and center of each group [groups, 1]."""
    groups = _grouped(x.float(), group_size)
    size = groups.abs()
    high = size.amax(1, keepdim=True)
    low = torch.where(size > 0, size, torch.inf).amin(1, keepdim=True).minimum(high)
    empty = high == 0
    high, low = high.masked_fill(empty, 1.0), low.masked_fill(empty, 1.0)
    power, center = torch.ones_like(high), torch.ones_like(high)
    if expand:
        # by logs: the product of two second moments may be below the smallest fp32 number
        center = ((high.log() + low.log()) / 2).exp()
        spread = (high.log2() - low.log2()).clamp(min=1e-6)
        log_range = torch.tensor(RANGE, device=x.device).log2()
        power = ((16 * log_range / spread).floor() / 16).clamp(1 / 16, STRONGEST)
    top = (high / center) ** power
    scale = top / LARGEST
    stretched = groups.sign() * (size / center) ** power / scale
    codes = stretched.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), scale, power, center


def restored(codes: Tensor, scale: Tensor, power: Tensor, center: Tensor, group_size: int) -> Tensor:
    """What `rounded` has stored, in fp32."""
    q = _grouped(codes.view(torch.float8_e4m3fn).float(), group_size)
    x = q.sign() * (q.abs() * scale) ** (1 / power) * center
    return x.flatten()[: codes.numel()].view(codes.shape)


def _grouped(x: Tensor, size: int) -> Tensor:
    """[groups, size], the last filled with zeros."""
    flat = x.flatten()
    missing = -len(flat) % size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, size)
