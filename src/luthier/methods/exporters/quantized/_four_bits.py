"""4-bit integers in groups, as compressed-tensors' W4A16, which vLLM runs by its Marlin kernels: what `gptq`
and `awq` share.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.exporters.quantized._compressed import CompressedTensors, Scaled, common_group
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules
from luthier.registry import build, family


@family
class FourBits(CompressedTensors):
    """Family: codes of one of luthier's quantizers, symmetric in groups."""

    scheme: ClassVar[str] = "W4A16"
    rounding: ClassVar[float] = 0.5
    quantizer: ClassVar[str] = "rtn"

    groups: int = 0  # weights of a row that share a scale; 0: the largest of 128, 64 and 32 that fits
    init_rows: int = 64  # training rows from which the inputs of layers are measured

    def group_size(self, plain, names):
        return self.groups or common_group(plain, names)

    def calibration(self, source: Any) -> list[dict]:
        """Rows of the run. Raises RecipeError where there are none."""
        rows = source.training_rows(self.init_rows)
        if not rows:
            raise RecipeError(f"export format '{self.name}' reads rows of the run, and there are none")
        return rows

    def scaled(self, source, plain, names, dtype):
        quantizer = build(
            "quantizer",
            {
                "name": self.quantizer,
                "bits_per_weight": 4,
                "group_size": self.group_size(plain, names),
                "symmetric": True,
                "skip_modules": self.skip_modules,
            },
        )
        rows = self.calibration(source) if quantizer.reads else []
        quantize(plain.model, quantizer, plain.roles, rows)
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
