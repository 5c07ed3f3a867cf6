"""Rejection sampling: keeps the best completion of each row."""

from __future__ import annotations

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, best_first, pick
from luthier.registry import stage


@stage(
    paper="arXiv:2304.06767",
    requires=[COMPLETIONS, SCORES],
    removes=[PAIRS],
    use_when="rows have several scored completions and only the best one should be trained on"
    " (rejection sampling).",
    costs="nothing beside reading the scores.",
)
class Best(Stage):
    """One completion per row, the one with the highest score (the first of equals). Rows without a good
    enough one are dropped.
    """

    asks_model = False

    least: float | None = None  # minimum score; no limit if not given

    def __call__(self, rows, roles):
        rows = list(rows)
        best = [pick(row, best_first(row)[:1]) for row in rows]
        chosen = [row for row in best if self.least is None or row["scores"][0] >= self.least]
        self.left(roles, len(rows) - len(chosen), len(rows), f"their best score is below {self.least}")
        return chosen
