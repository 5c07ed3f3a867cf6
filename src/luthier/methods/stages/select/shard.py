"""One part of the rows out of several equal ones: each round of a plan then has prompts of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    use_when="the rounds of a plan, or several runs, are to have different rows.",
    costs="nothing.",
)
class Shard(Stage):
    """Every `of`-th row, from row `part` on."""

    asks_model = False

    part: Annotated[int, Field(ge=0)] = 0  # which part, from 0 on
    of: Annotated[int, Field(ge=1)] = 2  # how many parts there are

    def __post_init__(self):
        if self.part >= self.of:
            raise ValueError(f"part: {self.part} is not below the number of parts, {self.of}")

    def __call__(self, rows, roles):
        return list(rows)[self.part :: self.of]
