"""The kind's protocol: a number for each text that was written for a row, the higher the better."""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.registry import family


@family
class Reward:
    """Family: a judge of texts. It has no state between calls, and the same texts get the same scores."""

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """One score per text, in the order of the texts. `row` is where the prompt came from, with all its
        columns.
        """
        raise NotImplementedError

    def column(self, row: dict, name: str) -> Any:
        """What the row says under a name; a sentence where it says nothing, since every text would then score
        0.
        """
        value = row.get(name)
        if value is None or (isinstance(value, (str, list, tuple)) and not value):
            has = ", ".join(map(str, row)) or "nothing"
            raise RecipeError(
                f"reward '{self.name}' needs the column '{name}', but a row does not have it (it has: {has})"
            )
        return value
