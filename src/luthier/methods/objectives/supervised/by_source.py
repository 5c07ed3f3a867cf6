"""One objective per source of the rows (column `source`), so that an estimator can weight sources against
each other.

Each source's term is averaged over its own units. Without such an estimator the loss is the sum of these
averages: small sources count as much as large ones.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.formats._base import SOURCE
from luthier.methods.objectives._base import Objective
from luthier.registry import family, nested, objective


@objective(
    requires=[SOURCE],
    use_when="rows come from several sources and each source should be a term of its own, to be"
    " weighted by an estimator such as `min_norm` or `penalty_bilevel`.",
    costs="as its inner objective; estimators that need a gradient for each term take a backward pass"
    " for each source.",
    starting_rate="that of its inner objective.",
)
class BySource(Objective):
    """One term a source, named as the source."""

    # values of the column; rows with other values are ignored
    sources: Annotated[tuple[str, ...], Field(min_length=1)] = ("train", "validation")
    inner: Annotated[Any, nested("objective")] = "sft"  # what is averaged over each source

    def __post_init__(self):
        if len(self.inner.terms()) > 1 or self.inner.unit == "batch":
            raise ValueError(
                f"inner: '{self.inner.name}' is a sum, or gives one number per batch, and"
                " cannot be split by source"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("sources: a source is listed twice")

    def terms(self):
        return [(1.0, OfSource(inner=self.inner, source=source)) for source in self.sources]

    def loss(self, roles, batch):
        return self.inner.loss(roles, batch)

    def count(self, batch):
        return self.inner.count(batch)


@family
class OfSource(Objective):
    """The units of one source; units of other sources are not counted."""

    inner: Any  # an objective
    source: str  # whose rows count

    @property
    def name(self) -> str:
        return self.source

    @property
    def requires(self) -> frozenset[str]:
        return self.inner.requires

    @property
    def contract(self) -> dict[str, str]:
        return self.inner.contract

    def suits_recipe(self, recipe, methods):
        for _, term in self.inner.terms():
            term.suits_recipe(recipe, methods)

    def row_warnings(self, rows):
        own = [row for row in rows if row.get("source") == self.source]
        if not own:
            return []
        return [sentence for _, term in self.inner.terms() for sentence in term.row_warnings(own)]

    def here(self, batch) -> torch.Tensor:
        """[units] bool."""
        rows = batch.sent(torch.tensor([row.get("source") == self.source for row in batch.rows]))
        return rows[self.inner.rows_of_units(batch)]

    def loss(self, roles, batch):
        return torch.where(self.here(batch), self.inner.loss(roles, batch), 0.0)

    def rows_of_units(self, batch):
        return self.inner.rows_of_units(batch)

    def count(self, batch):
        return self.inner.count(batch)

    def divisor(self, batch):
        return float(self.here(batch).sum())
