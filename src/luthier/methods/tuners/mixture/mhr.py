"""MHR: an inventory of low-rank skills; each task mixes them by weights of its own, and does so anew in every
block of A's inputs and B's outputs.

Of skill i a layer has A_i and B_i. Task t has logits z[t, block, i]; sigmoid(z), in training with logistic
noise, normalised over the skills, are the weights with which A = sum a_i A_i and B = sum a_i B_i are made,
block by block; the layer adds B A x / r. With one block it is Poly. A batch may mix tasks: the mixed A and B
are made once a task, so a row costs what one adapter costs. A row's task is its column `task`, and rows
without one are read under the plain mean of the skills; without `tasks` there is one set of weights for
everything, and the update merges.

Few-shot adaptation from a finished run: `init_from` with other `tasks` begins new rows of z; `train: routers`
is MHR-z, `skills: 1` averages the inventory into one adapter, MHR-mu.

Departs: noise is drawn once for each task, layer and micro-batch, not once a row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.mixture._routed import low_rank, unrouted
from luthier.registry import Range, tuner


@tuner(
    example={"skills": 3, "heads": 2},
    paper="arXiv:2211.03831",
    row="mhr",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="many tasks share one run: they share low-rank skills, each mixes them in its own way, and a new"
    " task with few rows may train its weights alone.",
    costs="`skills` times the numbers of one low-rank adapter, and the time of one for each task in a batch.",
    starting_rate="the paper takes 3e-3 for the factors and 0.1 for the routers: `learning_rate: {default:"
    " 3e-3, Z: 0.1}`.",
    default_rate=2e-4,
    covers="routers by layer, block and task with logistic noise, Poly as its case of one block; batches that"
    " mix tasks; adaptation of routers alone, and of the averaged inventory.",
    omits="the paper's measurements on T0 and its gradient alignment.",
    tests=[
        "methods/tuners/mixture/test_mhr.py::test_blocks_and_skills_are_pefts_poly",
        "methods/tuners/mixture/test_mhr.py::test_one_skill_is_lora",
        "methods/tuners/mixture/test_mhr.py::test_a_mixed_batch_is_each_task_alone",
        "methods/tuners/mixture/test_mhr.py::test_the_average_starts_at_the_mean_and_routers_move_alone",
        "methods/tuners/mixture/test_mhr.py::test_many_tasks_need_more_than_one_adapter",
    ],
)
class MHR(Delta):
    """Low-rank skills that tasks mix, block by block."""

    kinds = (nn.Linear,)

    skills: Annotated[int, Field(ge=1), Range(2, 16)] = 8  # low-rank updates in the inventory
    heads: Annotated[int, Field(ge=1), Range(1, 16)] = 8  # blocks that are mixed on their own; 1: Poly
    r: Annotated[int, Field(ge=1), Range(1, 32, log=True)] = 4  # rank of each skill
    # names of the tasks, as in the column `task` of rows; null: one task
    tasks: list[str] | None = None
    train: Literal["all", "routers"] = "all"  # routers: the skills stay as they are

    @property
    def active_provides(self):
        return self.provides if self.tasks is None else self.provides - {MERGE}

    def __post_init__(self):
        if self.tasks is not None and len(set(self.tasks)) < max(1, len(self.tasks)):
            raise RecipeError("tuner 'mhr': tasks must be different names, at least one")

    def attach(self, model):
        from luthier.methods.tuners.mixture._mhr_model import MHRModel

        return MHRModel(self, model)

    def init(self, W):
        A = torch.empty(self.skills, self.r, W.shape[1])
        for skill in A:
            nn.init.kaiming_uniform_(skill, a=5**0.5)
        routers = torch.empty(len(self.tasks or [0]), self.heads, self.skills).uniform_(-1e-3, 1e-3)
        return {"A": A, "B": torch.zeros(self.skills, W.shape[0], self.r), "Z": routers, "route": unrouted()}

    def mixture(self, Z: Tensor, task: int, training: bool) -> Tensor:
        """[heads, skills] the weights of a task, which sum to 1; -1: the plain mean."""
        if task < 0:
            return torch.full_like(Z[0], 1 / self.skills)
        logits = Z[task]
        if training:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + uniform.log() - (-uniform).log1p()
        weights = logits.sigmoid()
        return weights / weights.sum(-1, keepdim=True)

    def mixed(self, p, task: int, training: bool = False) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a task."""
        weights = self.mixture(p.Z, task, training)
        reading, writing = (weights[blocks(n, self.heads, p.Z)] for n in (p.A.shape[2], p.B.shape[1]))
        return torch.einsum("is,sri->ri", reading, p.A), torch.einsum("os,sor->or", writing, p.B)

    def forward(self, x, y, p, layer):
        def factors(task: int) -> tuple[Tensor, Tensor]:
            return self.mixed(p, task, layer.training)

        if self.tasks is not None:
            return y + low_rank(x, p.route, factors, y.shape[-1]) / self.r
        A, B = factors(0)
        return y + x @ A.T @ B.T / self.r

    def factors(self, p):
        if self.tasks is not None:
            return None
        A, B = self.mixed(p, 0)
        return A, B / self.r

    def weight(self, W, p):
        A, B = self.mixed(p, -1 if self.tasks is not None else 0)
        return W + B @ A / self.r


def blocks(n: int, heads: int, beside: Tensor) -> Tensor:
    """[n] the block of each of n places, in `heads` blocks as equal as possible."""
    return torch.arange(n, device=beside.device) * heads // n
