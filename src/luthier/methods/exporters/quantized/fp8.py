"""fp8: linear weights in 8-bit floats (E4M3) with a scale for each output; inputs are rounded as they come.

The form that vLLM and others call FP8 dynamic in compressed-tensors. Numbers told when it is exported are
those of the rounded weights, with inputs as they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from luthier.methods.exporters.quantized._compressed import CompressedTensors, rows_scaled
from luthier.model.linear import linear_modules, oriented
from luthier.registry import exporter


@exporter(
    use_when="it is served on GPUs with 8-bit floats (Ada, Hopper, MI300 and later).",
    costs="8 bits a weight; reads no rows.",
    tests=["methods/exporters/quantized/test_compressed.py::test_codes_are_read_back"],
)
class FP8(CompressedTensors):
    """8-bit floats."""

    scheme: ClassVar[str] = "FP8_DYNAMIC"
    rounding: ClassVar[float] = 0.06

    def scaled(self, source, plain, names, dtype):
        largest = torch.finfo(torch.float8_e4m3fn).max
        modules = linear_modules(plain.model)
        for name in names:
            yield name, rows_scaled(oriented(modules[name]), largest, dtype)
