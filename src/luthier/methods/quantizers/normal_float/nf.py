"""NF-b: NormalFloat of 2, 3, 4 or 8 bits with scales of any width, as LQ-LoRA uses it.

b + b1 / block_size + (bits of the second scale) / (block_size * second_block_size) bits a weight.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from luthier.methods.quantizers._base import Quantizer
from luthier.methods.quantizers.codebook._book import nearest, normal_float
from luthier.methods.quantizers.normal_float._bits import pack, unpack
from luthier.registry import quantizer


@quantizer(
    paper="arXiv:2311.12023",
    use_when="you want NormalFloat with other bits or block sizes than QLoRA's, such as 3 or 2 bits.",
    costs="`num_bits_0` bits a weight plus the scales of its blocks.",
)
class NF(Quantizer):
    """NormalFloat codes; block magnitudes as integers; their largest as a 16- or 32-bit float."""

    num_bits_0: Literal[2, 3, 4, 8] = 4  # bits of a weight's code
    num_bits_1: Literal[2, 3, 4, 8] = 8  # bits of a block's magnitude
    block_size_0: int = 64  # weights per block
    block_size_1: int = 256  # magnitudes that share a second scale
    second_dtype: Literal["bfloat16", "float16", "float32"] = "float32"  # dtype of the second scale

    def quantize(self, W, stats=None):
        flat = W.reshape(-1).float()
        blocks = F.pad(flat, (0, -len(flat) % self.block_size_0)).view(-1, self.block_size_0)
        top = F.pad(blocks.abs().amax(1), (0, -len(blocks) % self.block_size_1)).view(-1, self.block_size_1)
        second = top.amax(1).to(getattr(torch, self.second_dtype))
        steps = 2**self.num_bits_1 - 1
        whole = (
            (top / second.float().clamp(min=1e-30)[:, None] * steps)
            .round()
            .clamp(0, steps)
            .flatten()[: len(blocks)]
        )
        codes = {"absmax": pack(whole.to(torch.uint8), self.num_bits_1), "second": second}
        scale = self.scales(codes, len(blocks))
        book = torch.tensor(normal_float(self.num_bits_0), device=W.device)
        places = nearest((blocks / scale.clamp(min=1e-30)[:, None]).clamp(-1, 1), book)
        return {**codes, "weight": pack(places.to(torch.uint8), self.num_bits_0)}

    def scales(self, codes, blocks):
        """[blocks] magnitudes, as the codes have them."""
        whole = unpack(codes["absmax"], self.num_bits_1, blocks).float() / (2**self.num_bits_1 - 1)
        return whole * codes["second"].float().repeat_interleave(self.block_size_1)[:blocks]

    def dequantize(self, codes, shape, dtype):
        n = shape[0] * shape[1]
        blocks = -(-n // self.block_size_0)
        book = torch.tensor(normal_float(self.num_bits_0), device=codes["weight"].device)
        places = unpack(codes["weight"], self.num_bits_0, blocks * self.block_size_0).int()
        weights = book.index_select(0, places).view(blocks, -1) * self.scales(codes, blocks)[:, None]
        return weights.flatten()[:n].view(shape).to(dtype)

    def bits(self, shape):
        n = shape[0] * shape[1]
        blocks = -(-n // self.block_size_0)
        second = 32 if self.second_dtype == "float32" else 16
        eights = lambda count, bits: 8 * -(-count // 8) * bits  # codes lie in eights
        return (
            eights(blocks * self.block_size_0, self.num_bits_0)
            + eights(blocks, self.num_bits_1)
            + second * -(-blocks // self.block_size_1)
        ) / n
