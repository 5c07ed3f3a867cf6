"""INT8: integers from -127 to 127, one scale for each output of a layer.

The weights of LLM.int8(). Departs from it in the inputs, which are not quantized: the weight is dequantized
to the compute dtype, so no outlier columns need to be separated, and only the weights are rounded.
"""

from __future__ import annotations

import torch

from luthier.methods.quantizers._base import Quantizer
from luthier.registry import quantizer


@quantizer(
    paper="arXiv:2208.07339",
    use_when="you want half the memory of 16-bit weights at hardly any loss of quality.",
    costs="8 bits a weight plus one scale for each output.",
)
class INT8(Quantizer):
    """8 bits a weight."""

    def quantize(self, W, stats=None):
        scale = W.abs().amax(1) / 127
        return {"weight": (W / scale.clamp(min=1e-38)[:, None]).round().to(torch.int8), "scale": scale}

    def dequantize(self, codes, shape, dtype):
        return codes["weight"].to(torch.float32).mul_(codes["scale"][:, None]).to(dtype)

    def bits(self, shape):
        return 8 + 32 / shape[1]
