"""Leaves out prompts whose completions all have the same score: of these an objective that compares them
learns nothing (DAPO's dynamic sampling).

DAPO draws further prompts until the batch is full. Here a step draws more prompts than it needs
(`per_device_train_batch_size`), and `rows` of those that teach something are kept, so that the work of a
step is bounded and a resumed run draws the same.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import SCORES
from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:2503.14476",
    requires=[SCORES],
    use_when="many prompts are answered all right or all wrong and their share changes as the policy"
    " learns: put it behind `score`.",
    costs="nothing; it saves the training of rows that teach nothing.",
)
class Informative(Stage):
    """Keeps rows whose scores differ by more than `least`, the first `rows` of them in each process."""

    asks_model = False

    least: Annotated[float, Field(ge=0)] = 0.0  # smallest difference of the best and the worst, exclusive
    rows: Annotated[int, Field(ge=1)] | None = None  # most rows that are kept; null: all

    def __call__(self, rows, roles):
        rows = list(rows)
        mixed = [row for row in rows if max(row["scores"]) - min(row["scores"]) > self.least]
        self.left(roles, len(rows) - len(mixed), len(rows), "their completions all have the same score")
        return mixed[: self.rows]
