"""NF4, the format of QLoRA: 16 levels at the quantiles of N(0, 1), one scale for each block of 64 weights,
scales in 8 bits.

4.127 bits per weight. Codes, scales and their layout are those of bitsandbytes. With tuner `lora` this is
QLoRA. Departs from it in the defaults: double quantization is on, and the optimizer state is not paged.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.methods.quantizers.codebook._book import CodeBook, normal_float
from luthier.registry import quantizer


@quantizer(
    paper="arXiv:2305.14314",
    row="qlora",
    use_when="a model does not fit in 16 bits: with tuner `lora` this is QLoRA, the usual way to"
    " fine-tune on one GPU.",
    costs="4.127 bits a weight; slower than 16 bits, as weights are expanded at each use.",
    covers="NF4's published table, double quantization, and LoRA on a base that stays in codes.",
    omits="paged optimizer state.",
    tests=[
        "methods/quantizers/normal_float/test_nf4.py::test_nf4_is_the_published_table",
        "methods/quantizers/normal_float/test_nf4.py::test_nf4_errs_less_than_fp4_and_int4_on_normal_weights",
        "methods/quantizers/normal_float/test_nf4.py::test_double_quantization_costs_an_eighth_and_little_error",
    ],
)
class NF4(CodeBook):
    """4-bit NormalFloat."""

    levels: ClassVar[tuple[float, ...]] = normal_float(4)
