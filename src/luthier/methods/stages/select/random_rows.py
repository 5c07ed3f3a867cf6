"""A random share of the rows: what every selection is to be compared with."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    example={"n": 3},
    use_when="a selection is to be compared with as many rows drawn at random.",
    costs="nothing.",
)
class RandomRows(Stage):
    """`n` rows, or a share of them, drawn without replacement; smaller draws are part of larger ones."""

    asks_model = False

    n: Annotated[int, Field(ge=1)] | None = None  # rows that are kept
    share: Annotated[float, Field(gt=0, le=1)] = 0.1  # or a share of all, where `n` is not set
    draw: int = 0  # number of the draw; another one gives other rows

    def __call__(self, rows, roles):
        rows = list(rows)
        n = self.n if self.n is not None else max(1, round(self.share * len(rows)))
        rng = roles.clock.rng("random_rows", self.draw, at=0)
        order = torch.randperm(len(rows), generator=rng).tolist()
        return self.drop(roles, rows, order[:n], "they were not drawn")
