"""SpIEL: trains a sparse update whose positions change during training. At intervals the smallest values are
dropped and as many promising positions are added.

Growth `ag`: in the first steps of every interval the gradient of the whole weight is examined as it is
computed; the k largest entries of the first one are the candidates, whose gradients are summed. Growth `ma`:
row and column maxima of squared gradients, as in SM3, estimate where growth is promising, and no further
gradient is needed. A new position starts at zero, as does its optimizer state, with its own step count. The
first exchange replaces all positions that are not selected again; then the fraction falls linearly to zero.

Departs: the paper initialises Adam's moments of a new position from the collected gradients; here they start
at zero with any optimizer (and `ma` does not require SM3). Candidates come from the first micro-batch of an
interval, so `ag` depends slightly on how the global batch is split, and it supports a single process only;
`ma` has neither limit.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners.sparse._sparse import Sparse, greatest, regrow, smallest
from luthier.registry import tuner


@tuner(
    paper="arXiv:2401.16405",
    row="spiel",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you want sparse fine-tuning of single weights whose positions are to be found while"
    " training, rather than fixed beforehand.",
    costs="values, positions and optimizer state of `density` of the entries; growth `ag` computes"
    " whole gradients in some steps, `ma` does not.",
    starting_rate="start with that of `lora`; its recipe here takes 0.005 on a toy model.",
    default_rate=2e-4,
)
class SpIEL(Sparse):
    """Sparse fine-tuning with a changing set of indices."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear,)
    changes_phase: ClassVar[bool] = True

    # growth by accumulated gradients, or by SM3's row and column statistics
    selection_algorithm: Literal["ag", "ma"] = "ag"
    # optimizer steps between two exchanges; more than the run has: no exchange
    reselection_steps: Annotated[int, Field(ge=1)] = 20
    # steps at the start of an interval in which gradients are collected
    selection_accumulation_steps: Annotated[int, Field(ge=1)] = 5
    # initial share that is exchanged, falling to 0 over the run
    initial_reselection_rate: Annotated[float, Field(ge=0, le=1)] = 0.2

    def __post_init__(self):
        if self.selection_accumulation_steps >= self.reselection_steps:
            raise RecipeError("selection_accumulation_steps must be less than reselection_steps")

    def attach(self, model):
        from luthier.methods.tuners.sparse.spiel.tuned import SpIELModel

        return SpIELModel(self, model)

    def share(self, step: int, total: int) -> float:
        """The share of places exchanged before this step (counted from 0); 0 where none is."""
        if step % self.reselection_steps != self.selection_accumulation_steps:
            return 0.0
        return (
            1.0
            if step == self.selection_accumulation_steps
            else self.initial_reselection_rate * (1 - step / total)
        )

    def watches(self, step: int) -> bool:
        """Are gradients of whole weights gathered in this step?"""
        return (
            self.selection_algorithm == "ag"
            and step % self.reselection_steps < self.selection_accumulation_steps
        )

    def begins(self, step: int) -> bool:
        """Is what was gathered forgotten before this step?"""
        return self.selection_algorithm == "ag" and step % self.reselection_steps == 0

    def nothing(self, shape, k, places):
        """What is known of a weight [out, in] with k places before anything was gathered."""
        if self.selection_algorithm == "ma":
            return {"rows": torch.zeros(shape[0]), "columns": torch.zeros(shape[1])}
        return {
            "passes": torch.zeros((), dtype=torch.int32),
            "candidates": torch.zeros(k, dtype=places),
            "sums": torch.zeros(k),
        }

    @torch.no_grad()
    def gather(self, G, stats):
        """G [out, in], a gradient passing by -> candidates and the sums of their gradients."""
        flat = G.flatten()
        if not stats["passes"]:
            stats["candidates"].copy_(greatest(flat.abs(), len(stats["candidates"])))
        stats["passes"] += 1
        stats["sums"] += flat[stats["candidates"].long()].float()

    @torch.no_grad()
    def follow(self, grad, indices, stats):
        """[k] gradients of the values -> the statistics of rows and columns."""
        if self.selection_algorithm == "ag":
            return
        width = len(stats["columns"])
        rows, columns = indices.long() // width, indices.long() % width
        estimate = torch.minimum(stats["rows"][rows], stats["columns"][columns]) + grad.float().square()
        stats["rows"].scatter_reduce_(0, rows, estimate, "amax")
        stats["columns"].scatter_reduce_(0, columns, estimate, "amax")

    @torch.no_grad()
    def exchange(self, share, values, indices, stats):
        """Drop and grow one weight's places, in place; the mask of those that are new."""
        dropped = smallest(values, int(len(values) * share))
        if self.selection_algorithm == "ag":
            if not stats["passes"]:  # no row reached this weight (an expert)
                return torch.zeros(len(values), dtype=torch.bool, device=values.device)
            stay = torch.ones(len(values), dtype=torch.bool, device=values.device).index_fill_(
                0, dropped, False
            )
            free = ~torch.isin(stats["candidates"], indices[stay])
            candidates, scores = stats["candidates"][free].long(), stats["sums"][free].abs()
            grown = candidates[scores.topk(min(len(dropped), len(scores))).indices]
        else:
            scores = torch.outer(stats["rows"], stats["columns"]).flatten()
            scores[indices.long()] = 0  # what moves already is not grown, nor what nothing speaks for
            best = greatest(scores, min(len(dropped), len(scores)))
            grown = best[scores[best] > 0]
        return regrow(values, indices, dropped, grown)
