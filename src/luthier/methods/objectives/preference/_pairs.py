"""Preference losses on the best and the worst completion of a row.

The value of a completion is by default its log-ratio to the reference, summed over tokens, and a method
defines the loss of the margin between the two values. Methods without a reference or with another
normalisation define their own `values`; methods that treat each side separately define the loss of a `pair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.methods.objectives._base import Objective
from luthier.model.batch import Batch
from luthier.registry import Range, family

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[Positive, Range(0.01, 1.0, log=True)]


def log_ratios(roles: Any, batch: Batch) -> Tensor:
    """[T] log of policy over reference."""
    return roles.policy.logprobs(batch) - roles.reference.logprobs(batch)


def best_and_worst(batch: Batch) -> tuple[Tensor, Tensor]:
    """[G], [G] the sequence of highest and of lowest score in each row; the same one where all scores are
    equal.
    """
    best, worst = batch.sent(torch.tensor(_best_and_worst(batch)))
    return best, worst


def _best_and_worst(batch: Batch) -> tuple[list[int], list[int]]:
    best, worst, first = [], [], 0
    for row in batch.rows:
        scores = row["scores"]
        best.append(first + scores.index(max(scores)))
        worst.append(first + scores.index(min(scores)))
        first += len(scores)
    return best, worst


def differing(batch: Batch) -> Tensor:
    """The rows whose best and worst completions differ."""
    rows = [i for i, (best, worst) in enumerate(zip(*_best_and_worst(batch), strict=True)) if best != worst]
    return batch.sent(torch.tensor(rows, dtype=torch.long))


def logistic(x: Tensor, wrong: float = 0.0) -> Tensor:
    """-log sigmoid(x); where a share `wrong` of the labels is taken to be the wrong way round, the mixture of
    both ways.
    """
    return -(1 - wrong) * F.logsigmoid(x) - wrong * F.logsigmoid(-x) if wrong else -F.logsigmoid(x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x <= 0, exact near both ends; x is kept below 0, where it would be infinite."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def one_sided(name: str, rows: Sequence[dict]) -> list[str]:
    """A sentence where all completions count as good, or all as bad: scores are compared with 0."""
    scores = [score for row in rows for score in row.get("scores", ())]
    good = sum(score > 0 for score in scores)
    if not scores or 0 < good < len(scores):
        return []
    side = "good (score above 0)" if good else "bad (score of 0 or less)"
    return [
        f"objective '{name}': all {len(scores):,} completions count as {side}, their scores are"
        f" {min(scores):g} to {max(scores):g}; shift the scores so that bad completions are at or below 0"
    ]


@family
class Pairs(Objective):
    """Family: a method defines the loss of a margin. A row whose completions have equal scores has a constant
    loss and no gradient.
    """

    costs: ClassVar[str] = "a forward and backward pass over both completions of each pair."
    starting_rate: ClassVar[str] = "that of `dpo`."
    unit = "group"

    beta: Beta = 0.1  # strength of the regularisation towards the reference

    def values(self, roles: Any, batch: Batch) -> Tensor:
        """[N] how much the policy prefers a completion; beta times this is its implicit reward."""
        return batch.sums(log_ratios(roles, batch))

    def cost(self, margin: Tensor) -> Tensor:
        """[G] value of the best minus value of the worst -> what it costs. Says what beta does."""
        raise NotImplementedError

    def pair(self, better: Tensor, worse: Tensor) -> Tensor:
        """[G], [G] values of the best and of the worst -> what they cost."""
        return self.cost(better - worse)

    def loss(self, roles, batch):
        values = self.values(roles, batch)
        best, worst = best_and_worst(batch)
        self.note(batch, values.detach(), best, worst)
        constant = values.detach()
        return self.pair(
            *(torch.where(best != worst, values[side], constant[side]) for side in (best, worst))
        )

    def note(self, batch: Batch, values: Tensor, best: Tensor, worst: Tensor) -> None:
        """Rewards of both sides, over the rows whose scores differ."""
        differ = differing(batch)
        chosen, rejected = self.beta * values[best[differ]], self.beta * values[worst[differ]]
        batch.note(margin=chosen - rejected, accuracy=(chosen > rejected).float())
        batch.note(**{"rewards/chosen": chosen, "rewards/rejected": rejected})
