"""SpIEL: trains a sparse update whose positions change during training. At intervals the smallest values are
dropped and as many promising positions are added.

Growth `ag`: in the first steps of every interval the gradient of the whole weight is examined as it is
computed; the k largest entries of the first one are the candidates, whose gradients are summed. With
`seed_moments` Adam's moments of a new position start at the mean and the mean square of these gradients, with
the number of their steps as its age. Growth `ma`: row and column maxima of squared gradients, as in SM3,
estimate where growth is promising, and no further gradient is needed; the paper steps with SM3 there (`optim:
sm3`). The first exchange replaces all positions that are not selected again; then the fraction falls linearly
to zero.

Departs: a step's gradient counts once, however it is split into micro-batches (the authors square each part),
and the first correction of a new position is exact (theirs counts one step less). Candidates come from the
first micro-batch of an interval. With several processes each has its own; after the first step they keep
those whose sums, added over the processes that report them, are largest, and from then on all gather the same
ones. With `ma`, and without `seed_moments`, a new position's state under Adam starts at zero.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from luthier.errors import RecipeError
from luthier.methods.transforms._base import GradientMoments
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners.sparse._sparse import Sparse, greatest, regrow, smallest
from luthier.registry import tuner


@tuner(
    paper="arXiv:2401.16405",
    row="spiel",
    provides=[DISABLE_ADAPTER, MERGE],
    contract={
        "processes": "each process has candidates of its own rows in the first step of an interval, so the"
        " statistics of the next exchange are not those of one process",
    },
    use_when="you want sparse fine-tuning of single weights whose positions are to be found while"
    " training, rather than fixed beforehand.",
    costs="values, positions and optimizer state of `density` of the entries; growth `ag` computes"
    " whole gradients in some steps, `ma` does not.",
    starting_rate="start with that of `lora`; its recipe here takes 0.005 on a toy model.",
    default_rate=2e-4,
    covers="the number of positions is constant, grown and dropped ones are disjoint; at full density it"
    " is Adam on the weights; growth `ma` scores are the outer product of SM3's statistics; "
    "planted positions are recalled more than five times as often as by chance; Adam's moments of"
    " a new position are those of the gathered gradients with `seed_moments`; two processes grow what one"
    " grows; with"
    " SM3 as the optimizer its accumulators are those of growth `ma`.",
    omits="a CUDA kernel of its own for the multiplication; the paper's experiments on Llama-2.",
    tests=[
        "methods/tuners/sparse/test_spiel.py::test_spiel_keeps_its_number_of_places",
        "methods/tuners/sparse/test_spiel.py::test_spiel_at_full_density_is_adam_on_the_weights",
        "methods/tuners/sparse/test_spiel.py::test_spiel_ma_scores_are_the_outer_product_of_sm3",
        "methods/tuners/sparse/test_spiel.py::test_spiel_finds_planted_places",
        "methods/tuners/sparse/test_spiel.py::test_spiel_seeds_the_moments_of_a_new_place",
        "methods/tuners/sparse/test_spiel.py::test_spiel_grows_alike_in_all_processes",
        "methods/transforms/adaptive/test_sm3.py::test_sm3_keeps_the_statistics_of_growth_ma",
    ],
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
    # growth `ag`: start Adam's moments of new positions from the gathered gradients, as the paper does
    seed_moments: bool = False
    # weight of an L1 penalty on the trained values (L2: transform weight_decay with `everything: true`)
    l1: Annotated[float, Field(ge=0)] = 0.0

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
            "steps": torch.zeros((), dtype=torch.int32),
            "candidates": torch.zeros(k, dtype=places),
            "current": torch.zeros(k),
            "sums": torch.zeros(k),
            "squares": torch.zeros(k),
        }

    @torch.no_grad()
    def gather(self, G, stats):
        """G [out, in], a gradient passing by -> candidates and the sums of their gradients in this step."""
        flat = G.flatten()
        if not stats["passes"]:
            stats["candidates"].copy_(greatest(flat.abs(), len(stats["candidates"])))
        stats["passes"] += 1
        stats["current"] += flat[stats["candidates"].long()].float()

    @torch.no_grad()
    def close(self, stats):
        """The end of a step: its gradient is one more of those that were gathered."""
        if stats["passes"]:
            stats["sums"] += stats["current"]
            stats["squares"] += stats["current"].square()
            stats["steps"] += 1
            stats["current"].zero_()

    def moments(self, grown, stats):
        """What is known of the gradients at [n] places that have just grown; None where no optimizer asks."""
        if not self.seed_moments or self.selection_algorithm == "ma" or not stats["steps"]:
            return None
        order, steps = stats["candidates"].argsort(), int(stats["steps"])
        at = order[torch.searchsorted(stats["candidates"][order], grown)]
        return GradientMoments(stats["sums"][at] / steps, stats["squares"][at] / steps, steps)

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
