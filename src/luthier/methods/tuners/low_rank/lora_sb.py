"""LoRA-SB: trains only R, an r by r matrix, in W + B R A, where B and A are orthonormal and frozen.

B, R and A start as the truncated SVD of the first step that full fine-tuning would take, -first_step *
sign(G), with G the mean gradient over `init_rows` rows. B'B = A A' = 1, so R's gradient is B' G A', the best
that rank r allows, and there is no scale to tune. Departs from the paper: G is the gradient of -log p of the
completions, whatever the objective is; before rows are read R is zero, so the tuned model starts as the base.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.registry import Range, tuner


@tuner(
    example={"r": 2, "init_rows": 2},
    paper="arXiv:2411.19557",
    row="lora-sb",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you want close to full fine-tuning's updates from very few trainable parameters, and"
    " rows to measure its first gradient on.",
    costs="r * r trainable numbers a matrix; before training, the full gradient over `init_rows` rows,"
    " a few layers at a time.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="orthonormal factors of the first full step, R's gradient B' G A', full tuning where all "
    "directions are there; merged to float32 where bfloat16 would lose the update (`export "
    "--dtype float32`).",
    omits="lower loss than LoRA on the toy language model, as its claim says; the paper's models.",
    tests=[
        "methods/tuners/low_rank/test_lora_sb.py::test_lora_sb_starts_as_the_first_full_step",
        "methods/tuners/low_rank/test_lora_sb.py::test_lora_sb_with_all_directions_is_full_tuning",
        "methods/tuners/low_rank/test_lora_sb.py::test_lora_sb_exports_exactly",
        "methods/tuners/low_rank/test_lora_sb.py::test_lora_sb_is_ahead_of_factors_of_the_weight",
    ],
)
class LoRASB(Delta):
    """r * r trainable parameters per module, in the directions of full fine-tuning's first step."""

    reads: ClassVar[str] = "gradients"

    r: Annotated[int, Range(8, 128, log=True)] = 32  # rank of the update
    init_rows: int = 64  # rows whose gradient determines the directions
    first_step: float = 1e-4  # size of the step that is factored: a learning rate of full fine-tuning

    def __post_init__(self):
        if self.r < 1 or self.init_rows < 1:
            raise RecipeError("r and init_rows must be at least 1")

    def init(self, W):
        r = min(self.r, *W.shape)
        B = torch.linalg.qr(torch.randn(W.shape[0], r))[0]
        A = torch.linalg.qr(torch.randn(W.shape[1], r))[0].T
        return {"A": frozen(A), "R": torch.zeros(r, r), "B": frozen(B)}

    def start(self, W, gradient):
        U, S, Vh = torch.linalg.svd(-self.first_step * gradient.sign(), full_matrices=False)
        r = min(self.r, *W.shape)
        return {"B": U[:, :r], "R": torch.diag(S[:r]), "A": Vh[:r]}

    def weight(self, W, p):
        return W + p.B @ p.R @ p.A

    def forward(self, x, y, p, layer):
        return y + ((x @ p.A.T) @ p.R.T) @ p.B.T

    def factors(self, p):
        return p.A, p.B @ p.R
