"""ALLoRA: LoRA without scale and dropout, whose outputs learn the faster the less they have changed.

The update is W + B A with B = 0 at the start, so that LoRA's B begins slowly. Here the gradient that arrives
at output i of the low-rank product is multiplied by c_i = 1 / sqrt(||(B A)_i|| + 1 / eta^2), a constant in
backward: eta where that row of the update is zero, less as the row grows. Values are those of LoRA with
lora_alpha = r. Departs: the coefficient is written down from the paper's text, not compared with code of the
authors; it is a method of its own (`coefficient`) that a subclass replaces. An optimizer that rescales each
number by itself (Adam) takes out a factor that stays the same: with it only changes of c_i are seen, and for
A the differences between rows.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.registry import Range, tuner


@tuner(
    example={"r": 2},
    paper="arXiv:2410.09692",
    row="allora",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you have few steps or few rows and do not want to choose a scale and a dropout for LoRA.",
    costs="those of `lora`; a product of r x r and one of out x r more in each layer.",
    starting_rate="that of `lora`; eta between 1 and 10.",
    default_rate=2e-4,
    covers="values of LoRA with scale 1, bit for bit; gradients by the coefficient of each row, eta at the"
    " start, falling as a row grows; folds and exports as LoRA.",
    omits="the paper's ablations (a coefficient of a whole matrix, or of the layer's output) and results; its"
    " equation is not checked against the authors' code.",
    tests=[
        "methods/tuners/low_rank/test_allora.py::test_values_are_loras",
        "methods/tuners/low_rank/test_allora.py::test_at_the_start_gradients_are_eta_times_loras",
        "methods/tuners/low_rank/test_allora.py::test_gradients_are_those_of_each_row_times_its_coefficient",
        "methods/tuners/low_rank/test_allora.py::test_the_coefficient_falls_as_a_row_grows",
    ],
)
class ALLoRA(Delta):
    """W + B A; gradients at output i times 1 / sqrt(||(B A)_i|| + 1 / eta^2)."""

    r: Annotated[int, Range(4, 64, log=True)] = 8  # rank of the update
    eta: Annotated[float, Field(gt=0)] = 4.0  # factor of the gradient of outputs that have not changed yet

    def __post_init__(self):
        if self.r < 1:
            raise RecipeError(f"r: {self.r} must be at least 1")

    def init(self, W):
        r = min(self.r, *W.shape)
        A = torch.empty(r, W.shape[1])
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A, "B": torch.zeros(W.shape[0], r)}

    def coefficient(self, norms: torch.Tensor) -> torch.Tensor:
        """[out] norms of the rows of B A -> the factors of their gradients."""
        return (norms + self.eta**-2).rsqrt()

    def factors_of_rows(self, p) -> torch.Tensor:
        """[out] constants; norms by the small matrix A A', without B A itself."""
        with torch.no_grad():
            squares = ((p.B @ (p.A @ p.A.T)) * p.B).sum(1)
            return self.coefficient(squares.clamp(min=0).sqrt())

    def weight(self, W, p):
        product = p.B @ p.A
        if product.requires_grad:
            factors = self.factors_of_rows(p)[:, None]
            product.register_hook(lambda gradient: gradient * factors)
        return W + product

    def forward(self, x, y, p, layer):
        update = (x @ p.A.T) @ p.B.T
        if update.requires_grad:
            factors = self.factors_of_rows(p)
            update.register_hook(lambda gradient: gradient * factors)
        return y + update

    def factors(self, p):
        return p.A, p.B
