"""Preference pairs from scored completions: the best against the worst."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, best_first, pick
from luthier.registry import stage


@stage(
    requires=[COMPLETIONS, SCORES],
    provides=[PAIRS],
    use_when="rows have several scored completions and you want to train `dpo` or similar objectives on"
    " best against worst.",
    costs="nothing beside reading the scores.",
)
class Pairs(Stage):
    """Two completions per row, the better first, with their scores. Rows whose completions have equal scores
    are dropped.
    """

    asks_model = False

    margin: Annotated[float, Field(ge=0)] = 0.0  # minimum difference of the two scores (exclusive)

    def __call__(self, rows, roles):
        rows, pairs = list(rows), []
        for row in rows:
            order = best_first(row)
            if row["scores"][order[0]] - row["scores"][order[-1]] > self.margin:
                pairs.append(pick(row, (order[0], order[-1])))
        gap = f" (they differ by {self.margin:g} or less)" if self.margin else ""
        self.left(roles, len(rows) - len(pairs), len(rows), f"all their completions have the same score{gap}")
        return pairs
