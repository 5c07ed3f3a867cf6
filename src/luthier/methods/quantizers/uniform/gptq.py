"""GPTQ: rounds weights column by column and compensates for the error of each in the columns that follow.

With H = X X' of the layer's inputs on the first rows: the error of a column, over the diagonal of the
Cholesky factor of H^-1, is spread over the rest along that factor's row. Columns are processed in their
order, in blocks. Groups and their scales are those of RTN, set when a group is reached. Departs from the
paper: the inputs of all layers are those of the unquantized model.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from luthier.errors import RecipeError
from luthier.methods.quantizers._base import QUANTIZED_WEIGHTS
from luthier.methods.quantizers.uniform.rtn import RTN, stored, unit_of
from luthier.registry import quantizer


@quantizer(
    example={"group_size": 16, "init_rows": 4},
    paper="arXiv:2210.17323",
    row="llm-compression-survey",
    provides=[QUANTIZED_WEIGHTS],
    use_when="you want few bits with less error than rounding, and can read some rows first.",
    costs="`bits_per_weight` bits plus 32 bits for each group; one pass over `init_rows` rows and a"
    " Cholesky factor per layer.",
    covers="errors of columns compensated in those that follow.",
    omits="inputs that come through layers quantized before; columns in another order (act_order).",
    tests=[
        "methods/quantizers/uniform/test_gptq.py::test_gptq_errs_less_on_what_the_layer_reads",
    ],
)
class GPTQ(RTN):
    """Rounding with second-order error compensation."""

    whole: ClassVar[bool] = True
    reads: ClassVar[str] = "hessian"

    damp_percent: float = 0.01  # share of H's mean diagonal that is added to the diagonal
    init_rows: int = 64  # rows from which H is computed

    def quantize(self, W, stats=None):
        if stats is None:
            return super().quantize(W)
        if W.shape[1] % self.group_size:
            raise RecipeError(
                f"quantizer 'gptq': group_size {self.group_size} does not divide the"
                f" {W.shape[1]} inputs of a layer"
            )
        W, H, top = W.float().clone(), stats.clone(), 2**self.bits_per_weight - 1
        H.diagonal().add_(self.damp_percent * H.diagonal().mean().clamp(min=1e-8))
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        unit = unit_of(*self.grid(W))

        def rounded(x: torch.Tensor) -> torch.Tensor:
            """As it is stored."""
            if unit is None:
                return x.to(torch.float16).float()
            return (x / unit).to(torch.float16).float() * unit

        low, scale, done = [], [], torch.empty_like(W)
        for start in range(0, W.shape[1], self.group_size):
            end = start + self.group_size
            group = W[:, start:end]
            step, lowest = self.bounds(group)
            low.append(rounded(lowest))
            scale.append(rounded(step).clamp(min=1e-30))
            errors = torch.empty_like(group)
            for k in range(start, end):
                w = W[:, k]
                q = ((w - low[-1]) / scale[-1]).round().clamp(0, top) * scale[-1] + low[-1]
                done[:, k] = q
                errors[:, k - start] = (w - q) / U[k, k]
                W[:, k + 1 : end] -= torch.outer(errors[:, k - start], U[k, k + 1 : end])
            W[:, end:] -= errors @ U[start:end, end:]
        codes = stored(torch.stack(scale, 1).flatten(), torch.stack(low, 1).flatten(), unit)
        return self.nearest(done, codes)
