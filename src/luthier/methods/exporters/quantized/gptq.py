"""gptq: linear weights in 4 bits, rounded column by column so that what follows makes up for each error.

Codes are luthier's quantizer `gptq` on the run's own rows, symmetric in groups; they are packed as
compressed-tensors' W4A16, which vLLM runs by its Marlin kernels. The package gptqmodel has a form of its own,
which this is not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.exporters.quantized._compressed import CompressedTensors, Scaled, common_group
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules
from luthier.registry import build, exporter


@exporter(
    use_when="a quarter of the memory of 16 bits is wanted, and the rows that it was tuned on are there.",
    costs="4 bits a weight and 16 for each group; a pass over `init_rows` rows, and minutes of rounding.",
    tests=["methods/exporters/quantized/test_compressed.py::test_codes_are_read_back"],
)
class GPTQ(CompressedTensors):
    """4-bit integers in groups, with second-order error compensation."""

    scheme: ClassVar[str] = "W4A16"
    rounding: ClassVar[float] = 0.5
    quantizer: ClassVar[str] = "gptq"

    groups: int = 0  # weights of a row that share a scale; 0: the largest of 128, 64 and 32 that fits
    init_rows: int = 64  # training rows from which the inputs of layers are measured

    def group_size(self, plain, names):
        return self.groups or common_group(plain, names)

    def scaled(self, source, plain, names, dtype):
        rows = source.training_rows(self.init_rows)
        if not rows:
            raise RecipeError(f"export format '{self.name}' reads rows of the run, and there are none")
        settings = {
            "name": self.quantizer,
            "bits_per_weight": 4,
            "group_size": self.group_size(plain, names),
            "symmetric": True,
            "skip_modules": self.skip_modules,
            "init_rows": self.init_rows,
        }
        quantize(plain.model, build("quantizer", settings), plain.roles, rows)
        for name, module in modules(plain.model).items():
            yield name, on_grid(module, dtype)


def on_grid(module: Any, dtype: torch.dtype) -> Scaled:
    """A module of codes -> its weight with the same codes on scales that are rounded to dtype, and these."""
    weight: Tensor = module.dense(torch.float32)
    scale = module.codes["scale"].float()
    if "unit" in module.codes:
        scale = scale * module.codes["unit"]
    scale = scale.view(len(weight), -1, 1).clamp(min=1e-30)
    codes = (weight.view(len(weight), scale.shape[1], -1) / scale).round()
    stored = scale.to(dtype)
    return (codes * stored.float()).view_as(weight), stored.squeeze(-1)
