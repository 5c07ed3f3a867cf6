"""SmoothQuant: 8-bit weights and 8-bit inputs, after moving what is difficult in the inputs into the weights.

Inputs are divided and weights multiplied by s = max|x|^a / max|w|^(1 - a), channel by channel, so that
neither has outliers; then the weight is rounded to integers from -127 to 127 with one scale for each output,
and in every forward pass each token's input likewise, with a scale of its own. Gradients pass the rounding of
inputs unchanged. Departs from the paper: the inputs' rounding is simulated, and the product is computed in
the compute dtype, so it shows what quality eight-bit inputs leave and saves no time; s is not folded into the
layer before.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from luthier.methods.quantizers._base import Quantizer
from luthier.registry import quantizer


@quantizer(
    example={"init_rows": 4},
    paper="arXiv:2211.10438",
    row="llm-compression-survey",
    use_when="the model shall be served with 8-bit weights and activations, and you want to measure, or train"
    " with, what that costs in quality.",
    costs="8 bits a weight plus a scale for each output and each input; one pass over `init_rows` rows.",
    covers="scales that move outliers from inputs to weights, and inputs rounded token by token.",
    omits="integer products; static scales of inputs.",
    tests=[
        "methods/quantizers/uniform/test_smoothquant.py::test_smoothing_helps_where_an_input_is_an_outlier",
        "methods/quantizers/uniform/test_smoothquant.py::test_inputs_are_rounded_token_by_token",
    ],
)
class SmoothQuant(Quantizer):
    """W8A8 with smoothed inputs."""

    whole: ClassVar[bool] = True
    reads: ClassVar[str] = "input_maxima"

    # how much of the difficulty moves into the weights; 0: none
    migration_strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    init_rows: int = 64  # rows on which inputs are measured

    def quantize(self, W, stats=None):
        W = W.float()
        s = torch.ones_like(W[0])
        if stats is not None and self.migration_strength:
            a = self.migration_strength
            s = stats.float().clamp(min=1e-5) ** a / W.abs().amax(0).clamp(min=1e-5) ** (1 - a)
            s = s.clamp(min=1e-5)
        scaled = W * s
        scale = scaled.abs().amax(1) / 127
        codes = (scaled / scale.clamp(min=1e-38)[:, None]).round().to(torch.int8)
        return {"weight": codes, "scale": scale, "input_scale": s}

    def dequantize(self, codes, shape, dtype):
        W = codes["weight"].to(torch.float32).mul_(codes["scale"][:, None])
        return (W / codes["input_scale"]).to(dtype)

    def inputs(self, x, codes):
        smooth = x.detach().float() / codes["input_scale"]
        step = smooth.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        rounded = (smooth / step).round() * step * codes["input_scale"]
        return x + (rounded - x.detach().float()).to(x.dtype)

    def bits(self, shape):
        return 8 + 32 / shape[1] + 32 / shape[0]
