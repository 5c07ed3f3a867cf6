"""FP4: 16 levels of a sign, two bits of exponent and one of fraction, one scale for each block of 64 weights.

bitsandbytes' fp4, its default. NF4 fits weights better; this one is for comparison. Departs from bitsandbytes
in the numbering of levels: by magnitude.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.quantizers.codebook._book import CodeBook
from luthier.registry import quantizer

MAGNITUDES = (0.0052083333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)


@quantizer(
    paper="arXiv:2305.14314",
    use_when="you compare 4-bit formats, or need what bitsandbytes calls fp4. Otherwise `nf4` fits"
    " weights better.",
    costs="about 4.1 bits a weight with `double_quant`; weights are expanded at each use.",
)
class FP4(CodeBook):
    """4-bit floats."""

    levels: ClassVar[tuple[float, ...]] = (*(-m for m in reversed(MAGNITUDES)), 0.0, 0.0, *MAGNITUDES)
