"""Block-wise 8-bit Adam: both moments as one byte a number, an index into a table of 256 values.

Neighbouring numbers form blocks. Each block is divided by its largest magnitude, and what remains, within
[-1, 1], is rounded to the nearest value of the dynamic table of the paper (Dettmers et al. 2021), whose
values are spread over seven powers of ten, more of them near one; squares, never negative, have a table
without signs. The step itself is computed in fp32. Departs: small tensors and embeddings are in bytes, too;
plain torch, no fused kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Each
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.registry import transform

POWERS = 7  # of ten, over which the values of a table are spread


@transform(
    paper="arXiv:2110.02861",
    use_when="AdamW's state does not fit and you want the 8-bit Adam that is widely used.",
    costs="two bytes for each trainable parameter, and 8 for each block of 256; some time for rounding.",
    starting_rate="AdamW's.",
    covers="moments by blocks in the paper's dynamic table; the nearest value of the table; values of the"
    " table exactly; steps as Adam's to a few percent.",
    omits="fused kernels; fp32 states of small tensors and the stable embedding layer; paging.",
    tests=[
        "methods/transforms/adaptive/test_adam_8bit.py::test_rounds_to_the_nearest_value_of_the_table",
        "methods/transforms/adaptive/test_adam_8bit.py::test_the_state_is_two_bytes_a_parameter",
        "methods/transforms/adaptive/test_adam_8bit.py::test_steps_are_adams_to_a_few_percent",
    ],
)
class Adam8bit(Each):
    """Adam, its state in blocks of bytes."""

    rescales = True

    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator
    block_size: Annotated[int, Field(ge=1)] = 256  # numbers that share a scale

    def init(self, like):
        return self.stored({"m": torch.zeros_like(like), "v": torch.zeros_like(like)})

    def update(self, grad, state, param, step):
        moments = self.restored(state)
        update = self.adam().update(grad, moments, param, step)
        self.store(moments, state)
        return update

    def seed(self, state, entries, gradients):
        moments = self.restored(state)
        steps = self.adam().seed(moments, entries, gradients)
        self.store(moments, state)
        return steps

    def adam(self) -> Adam:
        return Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon)

    def stored(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes and scales of both moments."""
        m, m_scale = rounded(moments["m"], self.block_size, signed=True)
        v, v_scale = rounded(moments["v"], self.block_size, signed=False)
        return {"m": m, "m_scale": m_scale, "v": v, "v_scale": v_scale}

    def store(self, moments: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        for key, tensor in self.stored(moments).items():
            state[key].copy_(tensor)

    def restored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both moments in fp32."""
        m = restored(state["m"], state["m_scale"], self.block_size, signed=True)
        v = restored(state["v"], state["v_scale"], self.block_size, signed=False)
        return {"m": m, "v": v}


@cache
def table(signed: bool) -> Tensor:
    """The dynamic table, [256] ascending: 0, 1, midpoints of even steps from 0.1 to 1 by powers of ten."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for power in range(POWERS):
        count = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power + 1 - POWERS)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float()


def rounded(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """x -> codes of its shape (uint8) and the scale of each block [blocks, 1]."""
    blocks = _blocks(x.float(), block_size)
    scale = blocks.abs().amax(1, keepdim=True)
    values = table(signed).to(x.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scale.masked_fill(scale == 0, 1.0), borders).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), scale


def restored(codes: Tensor, scale: Tensor, block_size: int, signed: bool) -> Tensor:
    """What `rounded` has stored, in fp32."""
    values = table(signed).to(codes.device)[codes.long()]
    return (_blocks(values, block_size) * scale).flatten()[: codes.numel()].view(codes.shape)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[blocks, size], the last filled with zeros."""
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
