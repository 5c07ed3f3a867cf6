"""gptq: linear weights in 4 bits, rounded column by column so that what follows makes up for each error.

Codes are those of luthier's quantizer `gptq` on the run's own rows, packed as compressed-tensors' W4A16. The
package gptqmodel has a form of its own, which this is not.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.exporters.quantized._four_bits import FourBits
from luthier.registry import exporter


@exporter(
    use_when="a quarter of the memory of 16 bits is wanted, and the rows that it was tuned on are there.",
    costs="4 bits a weight and 16 for each group; a pass over `init_rows` rows, and minutes of rounding.",
    tests=["methods/exporters/quantized/test_compressed.py::test_codes_are_read_back"],
)
class GPTQ(FourBits):
    """4-bit integers with second-order error compensation."""

    quantizer: ClassVar[str] = "gptq"
