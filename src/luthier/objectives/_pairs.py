"""Preferences: what the best and the worst completion of a row have to do with each other.

A value per completion (here the log-ratio to the reference, summed over its tokens), and what a margin between the two
values costs. Methods without a reference, or with another normalisation, say their own `values`.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.batch import Batch
from luthier.method import Range, family
from luthier.objectives._objective import Objective

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[Positive, Range(0.01, 1.0, log=True)]


def log_ratios(roles: Any, batch: Batch) -> Tensor:
    """[T] log of policy over reference."""
    return roles.policy.logprobs(batch) - roles.reference.logprobs(batch)


def best_and_worst(batch: Batch) -> tuple[Tensor, Tensor]:
    """[G], [G] the sequence of highest and of lowest score in each row; the same one where all scores are equal."""
    best, worst, first = [], [], 0
    for row in batch.rows:
        scores = row["scores"]
        best.append(first + scores.index(max(scores)))
        worst.append(first + scores.index(min(scores)))
        first += len(scores)
    device = batch.ids.device
    return torch.tensor(best, device=device), torch.tensor(worst, device=device)


@family
class Pairs(Objective):
    """Family: a method says what a margin costs. A row whose completions score alike costs a constant: no gradient."""

    unit = "group"

    beta: Beta = 0.1  # strength of the pull towards the reference

    def values(self, roles: Any, batch: Batch) -> Tensor:
        """[N] how much the policy prefers a completion; beta times this is its implicit reward."""
        return batch.sums(log_ratios(roles, batch))

    def cost(self, margin: Tensor) -> Tensor:
        """[G] value of the best minus value of the worst -> what it costs. Says what beta does."""
        raise NotImplementedError

    def loss(self, roles, batch):
        values = self.values(roles, batch)
        best, worst = best_and_worst(batch)
        self.note(batch, values.detach(), best, worst)
        return self.cost(values[best] - values[worst])

    def note(self, batch: Batch, values: Tensor, best: Tensor, worst: Tensor) -> None:
        """Rewards of both sides, over the rows that tell them apart."""
        told = best != worst
        chosen, rejected = self.beta * values[best[told]], self.beta * values[worst[told]]
        batch.note(margin=chosen - rejected, accuracy=(chosen > rejected).float())
        batch.note(**{"rewards/chosen": chosen, "rewards/rejected": rejected})
