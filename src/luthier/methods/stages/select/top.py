"""Keeps the rows with the highest or lowest numbers in a column, or those within bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import number
from luthier.registry import stage


@stage(
    example={"by": [], "n": 3},
    use_when="rows have a score (likert, perplexity, ifd, or one of your own) and the best are to be kept.",
    costs="nothing.",
)
class Top(Stage):
    """The `n` rows, or the share, with the best product of the columns `by`, within `least` and `most`."""

    asks_model = False

    by: list[str] = field(default_factory=lambda: ["quality"])  # columns of numbers, whose product counts
    n: Annotated[int, Field(ge=1)] | None = None  # rows that are kept
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # or a share of all, where `n` is not set
    prefer: Literal["high", "low"] = "high"  # which numbers are better
    least: float | None = None  # rows below are dropped
    most: float | None = None  # rows above are dropped

    def __call__(self, rows, roles):
        rows = list(rows)
        numbers = [number(row, self.by, self.name) for row in rows]
        within = []
        for place, value in enumerate(numbers):
            if (self.least is None or value >= self.least) and (self.most is None or value <= self.most):
                within.append(place)
        sign = -1 if self.prefer == "high" else 1
        within.sort(key=lambda place: sign * numbers[place])
        n = self.n if self.n is not None else max(1, round(self.share * len(rows)))
        return self.drop(
            roles, rows, within[:n], f"their {' x '.join(self.by) or 'place'} is not among the best"
        )
