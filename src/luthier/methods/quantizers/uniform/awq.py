"""AWQ: rounds to nearest after scaling up the inputs' channels that carry large activations, so that their
weights lose less.

Q(W s) / s, with s = (root mean square of each input)^a, normalised. The exponent a of a matrix is the one of
21 between 0 and 1 with the least error of the layer's output on the first rows, tr(E H E') with H the sum of
x x'. Groups and scales are those of RTN. Departs from the paper: s is stored beside the codes, 16 bits for
each input, and not folded into the layer before; the mean square stands for the mean of the magnitudes; no
weights are clipped.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from luthier.methods.quantizers._base import QUANTIZED_WEIGHTS, Codes
from luthier.methods.quantizers.uniform.rtn import RTN, stored, unit_of
from luthier.registry import quantizer

EXPONENTS = 20  # steps between 0 and 1 that are tried


@quantizer(
    example={"group_size": 16, "init_rows": 4},
    paper="arXiv:2306.00978",
    row="llm-compression-survey",
    provides=[QUANTIZED_WEIGHTS],
    use_when="you want 3 or 4 bits, some inputs are far larger than others, and `gptq` takes too long.",
    costs="`bits_per_weight` bits, 32 bits for each group and 16 for each input; one pass over `init_rows`"
    " rows and 21 roundings per layer.",
    covers="scales by activations, chosen by the error of the layer's output.",
    omits="clipping of weights; scales folded into the layer before; kernels of its own.",
    tests=[
        "methods/quantizers/uniform/test_awq.py::test_awq_errs_less_where_some_inputs_are_large",
    ],
)
class AWQ(RTN):
    """Activation-aware weight quantization."""

    whole: ClassVar[bool] = True
    reads: ClassVar[str] = "hessian"

    init_rows: int = 64  # rows from which activations are measured

    def quantize(self, W, stats=None):
        if stats is None:
            stats = torch.eye(W.shape[1], device=W.device)
        W, H = W.float(), stats.float()
        size = (W.shape[0], W.shape[1])
        rms = H.diagonal().sqrt().clamp(min=1e-6)
        best, least = {}, float("inf")
        for i in range(EXPONENTS + 1):
            s = rms ** (i / EXPONENTS)
            s = (s / (s.max() * s.min()).sqrt()).to(torch.float16).float()
            codes = RTN.nearest(self, W * s, self.frame(W * s)) | {"input_scale": s.to(torch.float16)}
            E = self.dequantize(codes, size, torch.float32) - W
            error = float(((E @ H) * E).sum())
            if error < least:
                best, least = codes, error
        return best

    def frame(self, W: Tensor) -> Codes:
        """Scales and minima of a weight's groups, without codes."""
        scale, low = self.grid(W)
        return stored(scale, low, unit_of(scale, low))

    def nearest(self, W, codes):
        return super().nearest(W * codes["input_scale"].float(), codes)

    def dequantize(self, codes, shape, dtype):
        W = super().dequantize(codes, shape, torch.float32)
        return (W / codes["input_scale"].float()).to(dtype)

    def bits(self, shape):
        return super().bits(shape) + 16 / shape[0]
