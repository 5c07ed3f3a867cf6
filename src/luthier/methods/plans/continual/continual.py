"""A stream of tasks, learned one after the other, and what each run does to all of them.

Every run starts from the weights of the last and trains on the rows of one task (column `source`). All tasks
are measured before the stream and after each run: the transfer matrix. From it follow average accuracy,
backward and forward transfer and forgetting, transfers with 95% intervals over the held-out rows. The usual
remedies are settings or methods of the recipe:

- rehearsal: `replay: 200`, so many rows of earlier tasks in all, equally many of each, beside the new ones;
- cumulative, the upper bound: `cumulative: true` trains every run on all rows so far;
- learning without forgetting: `later: {objective: [sft, {name: distill, temperature: 2.0}], roles: {teacher:
  initial}}` holds the answers to the new rows near those of the model that the run starts from (Li and Hoiem,
  2016);
- consolidation: `estimator: ewc`, `si` or `rwalk` holds parameters that earlier tasks need.

The memory is a random sample, drawn so that a smaller one is part of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.methods.plans.continual._transfer import (
    Matrix,
    average_accuracy,
    backward_pairs,
    change_of_rows,
    forgetting,
    forward_pairs,
    interval,
    transfer,
)
from luthier.recipe.recipe import key_of
from luthier.registry import plan

EVERY = 10**9  # rows: all that there are


@plan(
    paper="arXiv:2305.04106",
    row="code-cl-ood",
    use_when="tasks come one after the other, and you ask what each costs those before it and gives to those"
    " behind it.",
    costs="a run for each task, and all tasks' held-out rows read before and after each.",
    covers="the matrix of every task after every run, average accuracy and forgetting by the paper's"
    " formulas; naive, cumulative and rehearsal; EWC, synaptic intelligence, RWalk and learning without"
    " forgetting are settings of its recipe.",
    omits="the five domains of code and their API calls; an encoder beside the decoder is another recipe.",
    tests=[
        "methods/plans/continual/test_continual.py::test_the_numbers_of_a_matrix_by_hand",
        "methods/plans/continual/test_continual.py::test_runs_read_their_task_and_the_memory_of_earlier_ones",
        "methods/plans/continual/test_continual.py::test_a_stream_that_was_stopped_goes_on_to_the_same_matrix",
        "methods/plans/continual/test_continual.py::test_a_stream_of_four_tasks",
        "methods/estimators/first_order/test_consolidation.py"
        "::test_learning_without_forgetting_compares_with_the_start_of_the_run",
    ],
)
class Continual(Plan):
    """One run for each task, in this order. The last run is the plan's result, with the matrix as a table."""

    tasks: tuple[str, ...] = ("None",)  # values of the column, in the order in which they are learned
    column: str = "source"  # column that names the task of a row, in training and held-out rows
    metric: str = "source_accuracy"  # the score, by source; higher is better
    replay: Annotated[int, Field(ge=0)] = 0  # rows of earlier tasks beside those of each later one
    cumulative: bool = False  # whether each run reads the rows of all tasks so far
    # changes to the recipe for every run after the first
    later: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("a stream needs at least one task")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: each can be there once")
        if self.cumulative and self.replay:
            raise ValueError("cumulative reads all earlier rows, so there is nothing to replay")

    def recipes(self, recipe):
        reports = []
        for place in range(len(self.tasks)):
            report = yield self.run_of(recipe, place, reports)
            reports.append(report)
        self.summarize(reports)
        return reports[-1]

    def run_of(self, recipe: Any, place: int, reports: Sequence[Any]) -> Any:
        """The recipe of a task's run, which goes on from the run before it."""
        run = self.measured(recipe, self.counts(place))
        if not place:
            return run
        changes = {key_of(key): value for key, value in self.later.items()}
        for key in ("init_from", "data", "stages", "evaluate"):
            if key in changes:
                raise RecipeError(f"later: {key} belongs to the stream and cannot be changed")
        return run.but(init_from=reports[-1].folder, **changes)

    def measured(self, recipe: Any, counts: dict[str, int]) -> Any:
        """The recipe on so many rows of each task, with the scores of all tasks."""
        measure = {"name": "by_source", "column": self.column}
        quotas = {"name": "quotas", "column": self.column, "counts": counts, "cap": 0}
        return recipe.but(
            evaluate=[*(recipe.evaluate or ()), measure], stages=[quotas, *(recipe.stages or ())]
        )

    def counts(self, place: int) -> dict[str, int]:
        """How many rows of each task a run reads."""
        earlier = self.tasks[:place]
        if self.cumulative:
            return dict.fromkeys([*earlier, self.tasks[place]], EVERY)
        counts = {}
        for k, name in enumerate(earlier):
            counts[name] = self.replay // place + (k < self.replay % place)
        return {**counts, self.tasks[place]: EVERY}

    def scores(self, reports: Sequence[Any]) -> Matrix:
        """The transfer matrix [T + 1, T]. Raises RecipeError where a task has no held-out rows."""
        matrix = []
        for measured in [reports[0].before, *(report.after for report in reports)]:
            line = []
            for name in self.tasks:
                try:
                    line.append(float(measured[f"{self.metric}/{name}"]))
                except KeyError:
                    raise RecipeError(
                        f"no held-out row has {self.column} '{name}'; give each source of `eval_data` its"
                        " name, e.g. {path: ..., source: " + name + "}"
                    ) from None
            matrix.append(line)
        return matrix

    def summarize(self, reports: Sequence[Any]) -> None:
        """Puts table, numbers and sentences into the last report."""
        matrix, last = self.scores(reports), reports[-1]
        table = []
        for when, line in zip(["before", *self.tasks], matrix, strict=True):
            table.append({"after": when, **dict(zip(self.tasks, line, strict=True))})
        last.stats["table"] = table
        count = len(self.tasks)
        last.stats["continual"] = numbers = {
            "average_accuracy": average_accuracy(matrix),
            "forgetting": forgetting(matrix),
        }
        last.notes.append(
            f"after {count} tasks: average {numbers['average_accuracy']:.3f},"
            f" forgetting {numbers['forgetting']:.3f}"
        )
        moments = [(reports[0].folder, "before"), *((report.folder, "after") for report in reports)]
        for name, pairs in (("backward", backward_pairs(count)), ("forward", forward_pairs(count))):
            numbers[f"{name}_transfer"] = transfer(matrix, pairs)
            sentence = f"{name} transfer {numbers[f'{name}_transfer']:+.3f}"
            changes = []
            for j, before, after in pairs:
                metric = f"{self.metric}/{self.tasks[j]}"
                changes.append(change_of_rows(metric, moments[before], moments[after]))
            measured = [change for change in changes if change is not None]
            if measured and len(measured) == len(pairs):
                low, high = interval(measured)
                numbers |= {f"{name}_low": low, f"{name}_high": high}
                sentence += f" (95% interval {low:+.3f} to {high:+.3f})"
            last.notes.append(sentence)
