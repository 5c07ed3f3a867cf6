"""The score of a toy task's verifier for a text: 1 where it is right. The column `task` names the task."""

from __future__ import annotations

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import Column, did_you_mean, reward
from luthier.storage.toy import toy_package

TASK = Column("task", says="rows of a toy task, whose column `task` names it")


@reward(
    requires=[TASK],
    former="world",
    use_when="rows are of a toy task, which has a verifier of its own.",
    costs="the verifier's time; code runs in the sandbox.",
)
class Task(Reward):
    """Numbers are results, functions are run on unit tests, queries on the database, tool calls parsed and
    checked; a task with several scores (style) gives their mean, or the one that `objective` names."""

    objective: str = ""  # one of several scores, such as formal, warm, short or complete of the task style

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """Between 0.0 and 1.0 per text; equal texts are verified once."""
        verify = toy_package().find(self.column(row, "task")).verify
        by_text = {text: self.one(verify(row, text), row) for text in dict.fromkeys(texts)}
        return [by_text[text] for text in texts]

    def one(self, verdict: float | dict[str, float], row: dict) -> float:
        """One number of a verdict. Raises RecipeError where it has no such objective."""
        several = verdict if isinstance(verdict, dict) else {}
        if not self.objective:
            return sum(several.values()) / len(several) if several else float(verdict)  # type: ignore[arg-type]
        if self.objective not in several:
            raise RecipeError(
                f"reward 'task': the verifier of row {row['id']} has no objective"
                f" '{self.objective}'{did_you_mean(self.objective, several)}"
            )
        return several[self.objective]
