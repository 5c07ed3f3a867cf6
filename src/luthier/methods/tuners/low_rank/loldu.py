"""LoLDU: decomposes W = P L D U and trains the first r entries of D and one scale; P, L and U are frozen.

W' = W + P L_r diag(scale z - scale_0 z_0) U_r with z_0 the first r entries of D and scale_0 = lora_alpha / r,
which is what the paper writes as a residual and a scaled product. Each matrix has r + 1 trainable parameters.
Departs from the paper: z always starts at its LU value. The paper's other initialisations (uniform, normal,
constant) do not start at the base model.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.registry import Range, tuner


@tuner(
    example={"r": 2},
    paper="arXiv:2410.13618",
    row="loldu",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="the adapter must be minute: it trains the first `r` diagonal entries of an LU"
    " decomposition and one scale per matrix.",
    costs="r + 1 trainable numbers a matrix; the frozen factors of every matrix stay beside it, and"
    " the decomposition takes time at the start.",
    starting_rate="several times LoRA's: its recipe here takes 0.01 where that of `lora` has 0.002.",
    default_rate=1e-3,
    covers="LDU factors of a weight, of which the diagonal is trained.",
    omits="starts other than the LU decomposition.",
    tests=[
        "methods/tuners/low_rank/test_loldu.py::test_loldu",
    ],
)
class LoLDU(Delta):
    """Low-rank adaptation by lower-diagonal-upper decomposition."""

    # trainable entries of the diagonal, at most all
    r: Annotated[int, Field(ge=1), Range(16, 768, log=True)] = 64
    lora_alpha: Annotated[float, Field(gt=0)] = 64  # the scale starts at lora_alpha / r

    def init(self, W):
        P, L, U = torch.linalg.lu(W.float())
        r = min(self.r, *W.shape)
        z = U.diagonal()[:r].clone()
        divisor = torch.where(z == 0, 1.0, z)  # a row of zeros stays one
        scale = torch.full((1,), self.lora_alpha / self.r, device=W.device)
        fixed = {"L": frozen(P @ L[:, :r]), "U": frozen(U[:r] / divisor[:, None]), "start": frozen(scale * z)}
        return {"z": z, "scale": scale, **fixed}

    def factors(self, p):
        return p.U, p.L * (p.scale * p.z - p.start)

    def weight(self, W, p):
        A, B = self.factors(p)
        return W + (B @ A).to(W.dtype)

    def forward(self, x, y, p, layer):
        return y + ((x @ p.U.T) * (p.scale * p.z - p.start)) @ p.L.T
