"""The kind's protocol. An objective returns one loss value per unit (token, sequence, row or batch), and the
trainer averages over the units of the whole global batch, so gradient accumulation, packing and data
parallelism do not change the result. Objectives can be summed: `dpo + 0.1*sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from luthier.registry import family, requires_of

if TYPE_CHECKING:
    from luthier.model.batch import Batch


@family
class Objective:
    """Family: `loss` returns one value per unit, never a mean."""

    costs: ClassVar[str] = "one forward and backward pass over each row."
    unit: ClassVar[str] = "token"  # token, sequence, group (row) or batch
    # on rows without `old`, is its value the same wherever the policy goes, and only its gradient tells?
    flat: ClassVar[bool] = False

    def loss(self, roles: Any, batch: Batch) -> Tensor:
        """[count(batch)] what each unit costs."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """How many units a batch holds; known before any forward."""
        return batch.count(self.unit)

    def rows_of_units(self, batch: Batch) -> Tensor:
        """[count(batch)] the row that each unit is of."""
        if self.unit == "token":
            return batch.group[batch.owner]
        if self.unit == "sequence":
            return batch.group
        return torch.arange(len(batch.rows), device=batch.ids.device)

    def divisor(self, batch: Batch) -> float:
        """What the sum over all units of a global batch is divided by, this batch's share of it: how many
        there are, or where they are weighted what they weigh together."""
        return self.count(batch)

    def suits_recipe(self, recipe: Any, methods: Any) -> None:
        """Raise RecipeError for a recipe whose stages write rows that cannot be learned."""

    def row_warnings(self, rows: Sequence[dict]) -> list[str]:
        """What a person should know before these rows are learned: sentences, none where all is well."""
        return []

    def terms(self) -> list[tuple[float, Objective]]:
        """(weight, objective) of each term; a single objective is one term, unless its method is a sum
        itself.
        """
        return [(1.0, self)]


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives on one forward pass; each term keeps its own average."""

    parts: tuple[tuple[float, Objective], ...] = ()

    name: ClassVar[str] = "sum"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(requires_of(o) for _, o in self.parts))

    def terms(self) -> list[tuple[float, Objective]]:
        return [(w * inner, term) for w, part in self.parts for inner, term in part.terms()]
