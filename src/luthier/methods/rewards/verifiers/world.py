"""The score of a toy task's verifier for a text: 1 where it is right. The row's `world` names the task."""

from __future__ import annotations

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import Column, did_you_mean, reward
from luthier.storage.toy import toy_package

WORLD = Column("world", says="rows of a toy task")


@reward(requires=[WORLD])
class World(Reward):
    """Numbers are results, functions are run on unit tests, queries on the database, tool calls parsed and
    checked; a world with several scores (style) gives their mean, or the one that `objective` names."""

    objective: str = ""  # one of several scores, such as formal, warm, short or complete of the world style

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """Between 0.0 and 1.0 per text; a text that says the same as another is verified once."""
        verify = toy_package().find(self.column(row, "world")).verify
        by_text = {text: self.one(verify(row, text), row) for text in dict.fromkeys(texts)}
        return [by_text[text] for text in texts]

    def one(self, verdict: float | dict[str, float], row: dict) -> float:
        """One number of a verdict; a sentence where it has no such objective."""
        several = verdict if isinstance(verdict, dict) else {}
        if not self.objective:
            return sum(several.values()) / len(several) if several else float(verdict)  # type: ignore[arg-type]
        if self.objective not in several:
            raise RecipeError(
                f"reward 'world': rows such as {row['id']} are not scored by"
                f" '{self.objective}'{did_you_mean(self.objective, several)}"
            )
        return several[self.objective]
