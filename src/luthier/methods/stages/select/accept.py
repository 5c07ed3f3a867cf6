"""Rejection sampling: of each row's samples those that are good enough, the best first."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, best_first, pick
from luthier.registry import stage


@stage(
    requires=[COMPLETIONS, SCORES],
    removes=[PAIRS],
    use_when="several good samples of a prompt are to be trained on, not only the best one (`best`).",
    costs="nothing beside reading the scores.",
)
class Accept(Stage):
    """Rows with the completions whose score is at least `least` (or the row's own `threshold`), at most
    `most` of them, each once. Rows without one are dropped.
    """

    asks_model = False

    least: float | None = None  # smallest score that is accepted; null: the row's column `threshold`, or any
    most: Annotated[int, Field(ge=1)] | None = None  # completions of a row at most; null: all

    def __call__(self, rows, roles):
        rows, accepted = list(rows), []
        for row in rows:
            least = row.get("threshold", float("-inf")) if self.least is None else self.least
            places, contents = [], set()
            for place in best_first(row):
                content = repr(row["completions"][place])
                if row["scores"][place] >= least and content not in contents:
                    places.append(place)
                    contents.add(content)
            if places:
                accepted.append(pick(row, places[: self.most]))
        self.left(roles, len(rows) - len(accepted), len(rows), "none of their completions is good enough")
        return accepted
