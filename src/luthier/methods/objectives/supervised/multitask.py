"""MFTCoder's losses: SFT of several tasks (column `source`) whose averages count alike, however many rows or
tokens each has.

`per: tokens` averages over the tokens of a task (as the paper recommends), `per: samples` first within each
answer; `weights` are divided by their sum. The focal variant multiplies an answer's loss by (1 - P)^gamma, P
the mean probability of its tokens, so that answers which are right already count little. Weights that follow
how fast tasks converge: estimators `famo` and `coba`. Departs: tasks that are absent from a step lose their
share of it instead of handing it to the others, so that a step does not depend on how it is split.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SOURCE
from luthier.methods.objectives._base import Objective
from luthier.registry import family, objective


@family
class Costs(Objective):
    """What an answer costs, by token or as a mean, with the focal factor."""

    per: Literal["tokens", "samples"] = "tokens"  # what each task's average is over
    gamma: Annotated[float, Field(ge=0)] = 0.0  # power of the focal factor; 0: none

    def loss(self, roles, batch):
        logprobs = roles.policy.logprobs(batch)
        cost, per_sample = -logprobs, self.per == "samples"
        if per_sample:
            cost = batch.means(cost)
        if self.gamma:
            wrong = (1 - batch.means(logprobs.exp())).clamp(min=0) ** self.gamma
            cost = cost * (wrong if per_sample else wrong[batch.owner])
        return cost

    def count(self, batch):
        return batch.count("sequence" if self.per == "samples" else "token")

    def rows_of_units(self, batch):
        return batch.group if self.per == "samples" else batch.group[batch.owner]


@objective(
    paper="arXiv:2311.02303",
    row="mftcoder",
    requires=[COMPLETIONS, SOURCE, LOGPROBS],
    use_when="several tasks of very different sizes are learned at once and each should count as much as the"
    " others; with estimator `coba` or `famo` the slower ones count more.",
    costs="as `sft`.",
    starting_rate="that of `sft`.",
    covers="equal or given weights of tasks, averages over tokens or samples of each, the focal variant of"
    " samples; weights by convergence are estimators `famo` and `coba`. Averages over everything are `sft`.",
    omits="the focal variant of whole tasks; the share of a task that is absent from a step is lost.",
    tests=[
        "methods/objectives/supervised/test_multitask.py::test_tasks_count_alike_whatever_their_sizes",
        "methods/objectives/supervised/test_multitask.py::test_one_task_of_equal_lengths_is_sft_in_every_mode",
        "methods/objectives/supervised/test_multitask.py::test_focal_by_hand_and_without_gamma_it_is_sft",
        "methods/estimators/multi_objective/test_famo.py::test_weights_shift_to_the_slower_task",
        "methods/estimators/multi_objective/test_coba.py::test_weights_shift_to_the_slower_task",
    ],
)
class Multitask(Costs):
    """One term a task, named as the task."""

    # values of the column `source`; rows with other values are not learned
    sources: Annotated[tuple[str, ...], Field(min_length=1)] = ("train", "validation")
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None  # of each task; 1 where it is not named

    def __post_init__(self):
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("sources: a source is listed twice")
        unknown = sorted({*(self.weights or {})} - {*self.sources})
        if unknown:
            raise ValueError(f"weights: {', '.join(unknown)} is not among the sources")
        if not any(self.weight(source) for source in self.sources):
            raise ValueError("weights: all of them are 0")

    def weight(self, source: str) -> float:
        return (self.weights or {}).get(source, 1.0)

    def terms(self):
        total = sum(self.weight(source) for source in self.sources)
        out: list[tuple[float, Objective]] = []
        for source in self.sources:
            term = TaskAverage(source=source, per=self.per, gamma=self.gamma)
            out.append((self.weight(source) / total, term))
        return out

    def row_warnings(self, rows):
        absent = sorted({str(row.get("source")) for row in rows} - {*self.sources})
        if not absent:
            return []
        return [f"objective 'multitask' does not learn rows of source {', '.join(absent)}"]


@family
class TaskAverage(Costs):
    """The average loss of one task; units of other tasks are zero and not counted."""

    requires: ClassVar[frozenset[str]] = frozenset({COMPLETIONS, SOURCE, LOGPROBS})
    contract: ClassVar[dict[str, str]] = {}

    source: str  # whose rows count

    @property
    def name(self) -> str:
        return self.source

    def chosen(self, batch: Any) -> torch.Tensor:
        """[units] bool: is it of this task?"""
        rows = batch.sent(torch.tensor([row.get("source") == self.source for row in batch.rows]))
        return rows[self.rows_of_units(batch)]

    def loss(self, roles, batch):
        return torch.where(self.chosen(batch), super().loss(roles, batch), 0.0)

    def divisor(self, batch):
        return float(self.chosen(batch).sum())
