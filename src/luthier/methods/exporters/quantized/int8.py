"""int8: linear weights in 8 bits with a scale for each output; inputs are rounded to 8 bits as they come.

The form that vLLM and others call W8A8 in compressed-tensors. Numbers told when it is exported are those of
the rounded weights, with inputs as they are.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.exporters.quantized._compressed import CompressedTensors, rows_scaled
from luthier.model.linear import linear_modules, oriented
from luthier.registry import exporter


@exporter(
    use_when="half the memory of 16 bits is wanted on GPUs older than Hopper (Turing, Ampere), or on CPUs.",
    costs="8 bits a weight; reads no rows.",
    tests=["methods/exporters/quantized/test_compressed.py::test_codes_are_read_back"],
)
class INT8(CompressedTensors):
    """8-bit integers."""

    scheme: ClassVar[str] = "W8A8"
    rounding: ClassVar[float] = 0.05

    def scaled(self, source, plain, names, dtype):
        modules = linear_modules(plain.model)
        for name in names:
            yield name, rows_scaled(oriented(modules[name]), 127.5, dtype)
