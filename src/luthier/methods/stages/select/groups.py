"""Keeps only the rows of some groups, so that whole tasks can be held out."""

from __future__ import annotations

from luthier.methods.stages._base import Stage
from luthier.registry import stage


@stage(
    paper="arXiv:2104.04670",
    row="meta-tuning",
    use_when="rows have a column that names their task or group, and whole groups are to be held out"
    " or dropped.",
    costs="nothing.",
)
class Groups(Stage):
    """Keeps rows whose column is one of `keep` (all if empty) and none of `drop`."""

    asks_model = False

    column: str = "task"  # name of the group column
    keep: tuple[str, ...] = ()  # groups that are kept
    drop: tuple[str, ...] = ()  # groups that are dropped

    def __call__(self, rows, roles):
        rows = list(rows)
        chosen = [
            r
            for r in rows
            if (not self.keep or r.get(self.column) in self.keep) and r.get(self.column) not in self.drop
        ]
        self.left(roles, len(rows) - len(chosen), len(rows), f"their {self.column} is not selected")
        return chosen
