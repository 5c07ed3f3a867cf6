"""Adds the rows that the earlier rounds of a plan trained on, as their runs stored them."""

from __future__ import annotations

from pathlib import Path

from luthier.errors import RecipeError
from luthier.methods.stages._base import Stage
from luthier.registry import stage
from luthier.storage.files import read_rows
from luthier.storage.layout import ROWS

MARK = "@round-"  # before the number of the round, in the id of a row that an earlier one brought


@stage(
    use_when="rounds of a plan are to train on the pairs or answers of all rounds so far.",
    costs="reading files.",
)
class EarlierRounds(Stage):
    """The rows, and behind them those of each folder, which end in `@round-` and its place."""

    folders: tuple[str, ...] = ()  # run folders, the first round's first

    def __call__(self, rows, roles):
        out = list(rows)
        for place, folder in enumerate(self.folders):
            path = Path(folder) / ROWS
            if not path.is_file():
                raise RecipeError(f"stage 'earlier_rounds': {folder} has no {ROWS}")
            for row in read_rows(path):
                if MARK not in str(row["id"]):  # it brought others itself
                    out.append({**row, "id": f"{row['id']}{MARK}{place}"})
        return out
