"""AdaLoRA: a low-rank update W + s B diag(E) A whose rank is distributed over the modules by importance.

Training begins with `init_r` ranks in each module and ends with `target_r` on average: the least important
triplets (a row of A, an entry of E, a column of B) have their E set to zero.

Importance is |parameter * gradient|, smoothed, times its smoothed uncertainty, as in PEFT's allocator, which
the tests compare with. While ranks are still being allocated, a pruned triplet's E can grow again and the
triplet can be selected again. Departs from the paper: steps are fractions of the run, and the orthogonality
of A and B is a transform of their gradients: `optim: [orthogonality, clip, adam]`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, FACTOR_B, LOW_RANK, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.registry import Range, tuner


@tuner(
    paper="arXiv:2303.10512",
    provides=[DISABLE_ADAPTER, MERGE, LOW_RANK, FACTOR_B],
    use_when="LoRA at one rank for all modules wastes parameters: the rank budget is distributed by"
    " importance while training. It needs runs long enough for the schedule of ranks.",
    costs="as LoRA of rank `init_r`, plus smoothed importances of every factor entry.",
    starting_rate="start with that of `lora`; its recipe here takes five times as much on the same toy"
    " model.",
    default_rate=1e-3,
)
class AdaLoRA(Delta):
    """Low rank, distributed over modules by importance."""

    target_r: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 8  # average rank per module at the end
    init_r: Annotated[int, Field(ge=1)] = 12  # rank of each module at the start
    lora_alpha: float = 32  # scale of B E A, before division by init_r
    tinit: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the run before ranks are reduced
    tfinal: Annotated[float, Field(ge=0, lt=1)] = 0.3  # share of the run, at its end, with fixed ranks
    deltaT: Annotated[int, Field(ge=1)] = 1  # steps between two allocations
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85  # smoothing of importance
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85  # smoothing of its uncertainty

    def __post_init__(self):
        if self.target_r > self.init_r:
            raise RecipeError(
                f"target_r ({self.target_r}) is larger than init_r ({self.init_r}), but ranks only shrink"
            )
        if self.tinit + self.tfinal >= 1:
            raise RecipeError(
                "tinit and tfinal cover the whole run, so no steps are left to reduce ranks; lower them"
            )

    def attach(self, model):
        from luthier.methods.tuners.low_rank.adalora.tuned import AdaLoRAModel

        return AdaLoRAModel(self, model)

    def init(self, W):
        return {
            "A": 0.02 * torch.randn(self.init_r, W.shape[1]),
            "E": torch.zeros(self.init_r),
            "B": 0.02 * torch.randn(W.shape[0], self.init_r),
        }

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.init_r

    def weight(self, W, p):
        return W + self.scale * (p.B * p.E) @ p.A

    def forward(self, x, y, p, layer):
        return y + ((x @ p.A.T) * (self.scale * p.E)) @ p.B.T

    def factors(self, p):
        return p.A, self.scale * p.B * p.E

    def budget(self, step: int, total: int, modules: int) -> int | None:
        """Ranks of all modules together after `step` of `total` (counted from 1); None where none are shared
        out.
        """
        begin, end = round(self.tinit * total), total - round(self.tfinal * total)
        whole, least = self.init_r * modules, self.target_r * modules
        if step <= begin:
            return None
        if step > end:
            return least
        left = (1 - (step - begin) / (end - begin)) ** 3
        return int((whole - least) * left + least) if step % self.deltaT == 0 else None
