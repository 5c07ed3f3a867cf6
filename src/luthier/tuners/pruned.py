"""Pruned: the smallest weights of every matrix become zero when a run begins and stay it; all others move.

Sparse fine-tuning of a model that is to be small and fast to read. The start is kept by whoever plays `start`, so the dense
model can teach (`squarehead`, `distill`). Zeros are counted in each row of a matrix, as WANDA compares weights, or, with a
pattern, n of every m neighbours are kept, which hardware reads faster. To raise sparsity in steps, write the acts of a plan
with a higher one each. Departs: by magnitude in one go, where the paper prunes by second-order information.
"""

from __future__ import annotations

import re
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.method import RecipeError, tuner
from luthier.tuners._anatomy import layer_of
from luthier.tuners._subset import Weights
from luthier.tuners._tuner import Tuner

PATTERN = re.compile(r"(\d+):(\d+)")


@tuner(paper="arXiv:2310.06927", row="squarehead", gives="merge")
class Pruned(Tuner):
    """All weights, the matrices of the layers with zeros that stay."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of every matrix that is zero
    pattern: str | None = None  # e.g. "2:4": of every four neighbours in a row two are kept, in place of sparsity

    def __post_init__(self):
        if self.pattern is not None:
            found = PATTERN.fullmatch(self.pattern)
            if not found or not 0 < int(found[1]) < int(found[2]):
                raise RecipeError(f"pattern: '{self.pattern}' is not of the form kept:neighbours, such as 2:4")

    def attach(self, model):
        return Zeros(self, model)

    def kept(self, W: Tensor) -> Tensor:
        """[out, in] -> which entries stay."""
        size = W.abs()
        if self.pattern is None:
            n, groups = round(self.sparsity * W.shape[1]), size
        else:
            keep, m = map(int, self.pattern.split(":"))
            if W.shape[1] % m:
                raise RecipeError(f"pattern: '{self.pattern}' does not divide rows of {W.shape[1]} weights")
            n, groups = m - keep, size.view(len(W), -1, m)
        gone = groups.argsort(dim=-1, stable=True)[..., :n]  # of equals the first
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).view_as(W)


class Zeros(Weights):
    """Which weights stay belongs to the state."""

    def __init__(self, settings, model):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        self.matrices = {
            f"{name}.weight": isinstance(m, Conv1D)
            for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and layer_of(f"{name}.") and f"{name}.weight" in self.names
        }
        if not self.matrices:
            raise RecipeError(f"tuner 'pruned' finds no matrices in the layers of {type(model).__name__}")
        self.stays = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in self.matrices}

    def memory(self):
        return {f"{n}.stays": t for n, t in self.stays.items()}

    @torch.no_grad()
    def initialize(self, rows, roles):
        for name, sideways in self.matrices.items():
            W = self.model.get_parameter(name)
            stays = self.settings.kept(W.T if sideways else W)
            self.stays[name].copy_(stays.T if sideways else stays)
        self.after_step(roles.clock)

    @torch.no_grad()
    def after_step(self, clock):
        for name, stays in self.stays.items():
            self.model.get_parameter(name).mul_(stays)
