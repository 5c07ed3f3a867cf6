"""List objectives: losses over all completions of a row and their scores, not only the best and the worst.

The value of a completion is beta times its log-ratio to the reference; a method defines the loss of a list of
values, given the scores. A list of two is a pair.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, log_ratios
from luthier.model.batch import Batch
from luthier.registry import family


@family
class Lists(Objective):
    """Family: `cost` maps the values [N] of a batch to a loss per row [G]. Scores are compared within a row
    only.
    """

    costs: ClassVar[str] = "a forward and backward pass over every completion of a row."
    starting_rate: ClassVar[str] = "that of `dpo`."
    unit = "group"

    beta: Beta = 0.1  # strength of the regularisation towards the reference

    def values(self, roles: Any, batch: Batch) -> Tensor:
        """[N] the implicit reward of each completion."""
        return self.beta * batch.sums(log_ratios(roles, batch))

    def cost(self, values: Tensor, batch: Batch) -> Tensor:
        """[N] values -> [G] what each row's ranking costs."""
        raise NotImplementedError

    def loss(self, roles, batch):
        values = self.values(roles, batch)
        better, worse = ordered(batch)
        batch.note(accuracy=(values[better] > values[worse]).float(), margin=values[better] - values[worse])
        return self.cost(values, batch)


def ordered(batch: Batch) -> tuple[Tensor, Tensor]:
    """[P], [P] every two completions of one row of which the first has the higher score."""
    better, worse, first = [], [], 0
    for row in batch.rows:
        scores = row["scores"]
        for i, high in enumerate(scores):
            for j, low in enumerate(scores):
                if high > low:
                    better.append(first + i)
                    worse.append(first + j)
        first += len(scores)
    better_places, worse_places = batch.sent(torch.tensor([better, worse], dtype=torch.long))
    return better_places, worse_places


def by_row(batch: Batch, places: Tensor, costs: Tensor, mean: bool = False) -> Tensor:
    """Costs [P] of things that belong to sequences `places` [P] -> [G] their sum, or mean, in each row."""
    row = batch.group[places]
    total = costs.new_zeros(len(batch.rows)).index_add(0, row, costs)
    return total / torch.bincount(row, minlength=len(batch.rows)).clamp(min=1) if mean else total


def rank(batch: Batch, values: Tensor) -> Tensor:
    """[N] the place of each completion in its row by value, 1 for the highest; of equals the
    earlier first.
    """
    order = torch.arange(len(values), device=values.device)
    same = batch.group[:, None] == batch.group
    ahead = (values > values[:, None]) | ((values == values[:, None]) & (order < order[:, None]))
    return 1 + (same & ahead).sum(1)
