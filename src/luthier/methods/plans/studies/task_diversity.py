"""Many tasks or many rows of each? Runs with more and more tasks at the same number of rows in all, scored on
tasks that none of them saw.

The study of Vision-Flan in its text form: rows name their task in a column, `held_out` names the tasks that
are only measured. With `chat` a last stage follows: the best run goes on for a few steps on rows of that task
alone, which change the form of answers and not what is right (Xu et al., 2024).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.registry import plan


@plan(
    paper="arXiv:2402.11690",
    row="vision-flan",
    use_when="rows are labelled by task and you ask whether more tasks or more rows of each help on new"
    " tasks.",
    costs="a run for each number of tasks, and a short one with `chat`.",
    covers="numbers of tasks at equal rows, scores on unseen tasks, a short second stage of rows that set the"
    " form, in texts.",
    omits="images and the projector before them, the 187 tasks, the runs that train a projector alone.",
    tests=[
        "methods/plans/studies/test_task_diversity.py::test_rows_are_equal_and_unseen_tasks_are_measured",
        "methods/plans/studies/test_task_diversity.py::test_a_short_second_stage_goes_on_from_the_best",
    ],
)
class TaskDiversity(Plan):
    """A run for each number of tasks. The best on the tasks that are held out is the plan's result."""

    tasks: tuple[str, ...] = ("None",)  # values of the column that are learned, in order
    held_out: tuple[str, ...] = ()  # values that are only measured; empty: the tasks themselves
    numbers: Annotated[tuple[int, ...], Field(min_length=1)] = (2, 4, 8, 16)  # of tasks
    rows: Annotated[int, Field(ge=1)] = 1000  # in all, of each run
    column: str = "source"  # column that names the task of a row
    metric: str = "source_accuracy"  # the score, by source; higher is better
    chat: str | None = None  # the task of a short second stage
    # changes of the recipe for the second stage
    second: dict[str, Any] = field(default_factory=lambda: {"max_steps": 128})

    def __post_init__(self):
        both = {*self.held_out} & {*self.tasks}
        if both:
            raise RecipeError(f"task_diversity: {', '.join(sorted(both))} is both learned and held out")

    def recipes(self, recipe):
        recipe = recipe.but(evaluate=[*(recipe.evaluate or ()), {"name": "by_source", "column": self.column}])
        numbers = sorted({min(n, len(self.tasks)) for n in self.numbers})
        reports = yield [self.with_counts(recipe, self.manifest(n)) for n in numbers]
        table = []
        for n, report in zip(numbers, reports, strict=True):
            table.append({"tasks": n, "rows a task": self.rows // n, "unseen": self.score(report)})
        best = max(reports, key=self.score)
        if self.chat is not None:
            stage = self.with_counts(recipe, {self.chat: self.rows})
            best = yield stage.but(init_from=best.folder, **self.second)
            table.append({"tasks": f"then {self.chat}", "rows a task": self.rows, "unseen": self.score(best)})
        best.stats["table"] = table
        return best

    def manifest(self, number: int) -> dict[str, int]:
        """Rows of each of the first tasks, of sum `rows`."""
        each, more = divmod(self.rows, number)
        return {name: each + (place < more) for place, name in enumerate(self.tasks[:number])}

    def with_counts(self, recipe: Any, counts: dict[str, int]) -> Any:
        stage = {"name": "quotas", "column": self.column, "counts": counts, "cap": 0}
        return recipe.but(stages=[stage, *(recipe.stages or ())])

    def score(self, report: Any) -> float:
        """The mean over tasks that are held out; what was not measured is 0."""
        names = self.held_out or self.tasks
        return sum(float(report.after.get(f"{self.metric}/{name}") or 0.0) for name in names) / len(names)
