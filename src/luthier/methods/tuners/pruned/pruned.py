"""Pruned: sets the least important weights of every matrix to zero before training and keeps them zero; all
others are trained.

For sparse fine-tuning of a model that should be small and fast. Role `initial` holds the model before
pruning, so that it can teach (`squarehead`, `distill`). Importance is `magnitude`; `wanda`
(arXiv:2306.11695), |w| times the norm of its input on the first rows; or `sparsegpt` (arXiv:2301.00774), w^2
over the diagonal of the inverse of X X', where later columns also compensate for the error of each zero. The
number of zeros is fixed per row of a matrix (sparsegpt: per block of columns), or, with a pattern, n of every
m neighbouring weights are kept, which some hardware computes faster. To raise sparsity in steps, write a plan
whose runs have increasing sparsity. Departs: pruning is done at once, and matrices that are measured in the
same pass over the rows (all, in a small model) use the activations of the dense model, where the papers prune
layer after layer.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import RecipeError
from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.anatomy import layer_of
from luthier.model.linear import uncalled_modules
from luthier.model.statistics import statistics
from luthier.registry import tuner

PATTERN = re.compile(r"(\d+):(\d+)")


@tuner(
    example={"init_rows": 2},
    paper="arXiv:2310.06927",
    row="squarehead",
    provides=[MERGE],
    use_when="the model is to end with a fixed share of zeros (such as 2:4) and must recover its"
    " quality by fine-tuning with them in place.",
    costs="as full fine-tuning, plus the mask; `wanda` and `sparsegpt` read `init_rows` rows first.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
)
class Pruned(Tuner):
    """All weights are trained; zeros in the matrices of the layers stay zero."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of every matrix that is zero
    # e.g. "2:4": of every four neighbours in a row two are kept, instead of sparsity
    pattern: str | None = None
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"  # importance criterion
    init_rows: Annotated[int, Field(ge=1)] = 64  # rows for wanda and sparsegpt
    block_size: Annotated[int, Field(ge=1)] = 128  # columns that sparsegpt compares at once
    # share of the mean diagonal of sparsegpt's X X' that is added to the diagonal
    damp_percent: Annotated[float, Field(gt=0)] = 0.01

    def __post_init__(self):
        if self.pattern is not None:
            match = PATTERN.fullmatch(self.pattern)
            if not match or not 0 < int(match[1]) < int(match[2]):
                raise RecipeError(f"pattern: '{self.pattern}' must have the form kept:group, such as 2:4")

    @property
    def reads_rows(self) -> bool:
        """Is importance measured on rows?"""
        return self.criterion != "magnitude"

    def attach(self, model):
        return PrunedModel(self, model)

    def mask(self, W: Tensor) -> Tensor:
        """[out, in] sizes -> which entries stay."""
        size = W.abs()
        if self.pattern is None:
            n, groups = round(self.sparsity * W.shape[1]), size
        else:
            n, m = self.few(W.shape[1])
            groups = size.view(len(W), -1, m)
        dropped = groups.argsort(dim=-1, stable=True)[..., :n]  # of equals the first
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, dropped, False).view_as(W)

    def few(self, width: int) -> tuple[int, int]:
        """How many of how many neighbours leave, by the pattern."""
        keep, m = map(int, str(self.pattern).split(":"))
        if width % m:
            raise RecipeError(f"pattern: '{self.pattern}' does not divide rows of {width} weights")
        return m - keep, m

    def repaired(self, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """[out, in] weights, [in, in] X X' -> which entries stay, and the weights with what the zeros do
        wrong made good.
        """
        W, H = W.clone(), H.clone()
        H.diagonal().add_(self.damp_percent * H.diagonal().mean().clamp(min=1e-8))
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        stays = torch.ones_like(W, dtype=torch.bool)
        dropped, m = (0, 0) if self.pattern is None else self.few(W.shape[1])
        size = self.block_size if not m else m * max(1, self.block_size // m)
        for start in range(0, W.shape[1], size):
            end = min(start + size, W.shape[1])
            errors = torch.zeros_like(W[:, start:end])
            if not m:
                worth = (W[:, start:end] / U.diagonal()[start:end]).square().flatten()
                least = worth.argsort(stable=True)[: round(self.sparsity * worth.numel())]
                stays[:, start:end] = (
                    torch.ones_like(worth, dtype=torch.bool).index_fill_(0, least, False).view(len(W), -1)
                )
            for k in range(start, end):
                if m and k % m == 0:  # neighbours are compared as what came before them has left them
                    worth = (W[:, k : k + m] / U.diagonal()[k : k + m]).square()
                    stays[:, k : k + m].scatter_(1, worth.argsort(dim=1, stable=True)[:, :dropped], False)
                wrong = torch.where(stays[:, k], 0.0, W[:, k]) / U[k, k]
                errors[:, k - start] = wrong
                W[:, k:end] -= torch.outer(wrong, U[k, k:end])
            W[:, end:] -= errors @ U[start:end, end:]
        return stays, W * stays


class PrunedModel(TunedWeights):
    """The masks belong to the state."""

    def __init__(self, settings, model):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        self.matrices = {
            f"{name}.weight": isinstance(m, Conv1D)
            for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and layer_of(f"{name}.") and f"{name}.weight" in self.names
        }
        if not self.matrices:
            raise RecipeError(f"tuner 'pruned' finds no matrices in the layers of {type(model).__name__}")
        silent = [name for name in uncalled_modules(model) if f"{name}.weight" in self.matrices]
        if silent and settings.reads_rows:
            raise RecipeError(
                f"tuner '{settings.name}' measures what matrices read, and {type(model).__name__} reads the"
                f" weight of {silent[0]} without calling the module; tuner 'pruned' with criterion magnitude"
                " measures nothing"
            )
        self.stays = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in self.matrices}

    def memory(self):
        return {f"{n}.stays": t for n, t in self.stays.items()}

    @torch.no_grad()
    def initialize(self, rows, roles):
        settings = self.settings
        if settings.criterion == "magnitude":
            for name in self.matrices:
                self.prune(name, settings.mask(self.weight(name)))
        else:  # one reading of the rows gathers as many layers as there is room for
            layers = {
                n.removesuffix(".weight"): self.model.get_submodule(n.removesuffix(".weight"))
                for n in self.matrices
            }
            for layer, C in statistics("covariance", layers, rows[: settings.init_rows], roles):
                name = f"{layer}.weight"
                if settings.criterion == "wanda":
                    self.prune(name, settings.mask(self.weight(name) * C.diagonal().sqrt()))
                else:
                    self.prune(name, *settings.repaired(self.weight(name), C))
        self.after_step(roles.clock)

    def weight(self, name: str) -> Tensor:
        """[out, in] in fp32."""
        W = self.model.get_parameter(name).detach().float()
        return W.T.contiguous() if self.matrices[name] else W

    def prune(self, name: str, stays: Tensor, W: Tensor | None = None) -> None:
        way = (lambda t: t.T) if self.matrices[name] else (lambda t: t)
        self.stays[name].copy_(way(stays))
        if W is not None:
            self.model.get_parameter(name).copy_(way(W))

    @torch.no_grad()
    def after_step(self, clock):
        for name, stays in self.stays.items():
            self.model.get_parameter(name).mul_(stays)
