"""ConPET: a stream of tasks with small modules, whose cost of training does not grow with the tasks.

Dynamic: every task gets a module of its own, trained from the base on its rows alone and never touched again.
A selector, a module too, learns to name the task of an input (stage `task_names`); it goes from task to task
with a memory of earlier rows. For an input the first `top_k` tasks by the selector answer with their modules
(evaluator `task_modules`). Static: one module for all tasks goes on from task to task with that memory.

What is trained with the memory reads so many new rows for each old one, and each earlier task as often as any
other, however many there are (Song et al., 2023). With `rows` every run reads the same number of rows;
without, as many as its task and the memory have.

Departs: classes are completions, not vectors on the prompt's last state; the shares of new and old rows hold
for a run and on average for a batch; the memory is a random sample of each task, where the paper's clusters
the rows of each class; the selector also starts from where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.methods.plans.continual._transfer import average_accuracy, forgetting
from luthier.recipe.recipe import key_of
from luthier.registry import plan

EVERY = 10**9  # rows: all that there are
METRIC = "routed_accuracy"


@plan(
    paper="arXiv:2309.14763",
    row="conpet",
    use_when="tasks with classes of their own come one after the other, inputs do not say of which they are,"
    " and the cost of learning the next is not to grow.",
    costs="dynamic: two runs for each task after the first, a module for each task and one more. Static: one"
    " run for each task.",
    covers="static and dynamic ConPET under any tuner: a shared module or one for each task, the selector,"
    " its first k modules, dynamic sampling from a memory of fixed size, whole and average accuracy after"
    " each task.",
    omits="a memory by k-means, losses of EMR, EA-EMR and CRL, linear vectors as classes, a selector that"
    " weighs tasks by their loss, the six data sets.",
    tests=[
        "methods/plans/continual/test_conpet.py::test_modules_start_from_the_base_and_the_selector_goes_on",
        "methods/plans/continual/test_conpet.py::test_no_run_reads_more_rows_than_those_before",
        "methods/plans/continual/test_conpet.py::test_later_tasks_do_not_touch_a_module",
        "methods/plans/continual/test_conpet.py::test_dynamic_is_above_static_above_sequential",
    ],
)
class ConPET(Plan):
    """Runs for each task in this order; the last one's report holds the table of all tasks."""

    tasks: tuple[str, ...] = ("None",)  # values of the column, in the order in which they are learned
    column: str = "source"  # column that names the task of a row, in training and held-out rows
    dynamic: bool = True  # a module for each task and a selector; false: one module for all tasks
    replay: Annotated[int, Field(ge=0)] = 200  # rows of earlier tasks in the memory
    ratio: Annotated[float, Field(gt=0)] = 1.0  # new rows for each row of the memory that is read
    rows: Annotated[int, Field(ge=1)] | None = None  # rows that each run reads in an epoch
    top_k: Annotated[int, Field(ge=1)] = 6  # modules that answer an input
    weighted: bool = False  # whether a module's scores add the selector's log-probability of its task
    # changes to the recipe for the selector's runs, e.g. {num_train_epochs: 1}
    selector: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("a stream needs at least one task")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: each can be there once")
        if self.dynamic and not self.replay and len(self.tasks) > 1:
            raise RecipeError("plan 'conpet': a selector needs rows of earlier tasks; set replay")
        for key in ("init_from", "data", "stages", "evaluate", "tuner", "model"):
            if key in {key_of(name) for name in self.selector}:
                raise RecipeError(f"plan 'conpet': selector cannot change {key}")

    def recipes(self, recipe):
        if recipe.init_from is not None:
            raise RecipeError("plan 'conpet': modules start from the base; leave init_from out")
        stream = self.apart(recipe) if self.dynamic else self.together(recipe)
        reports = yield from stream
        self.summarize(reports)
        return reports[-1]

    def together(self, recipe: Any):
        """One module goes through the stream. Returns the report behind each task."""
        reports = []
        for place in range(len(self.tasks)):
            run = self.sampled(recipe, place, self.replay)
            run = self.measured(run, dict.fromkeys(self.tasks[: place + 1]))
            reports.append((yield run.but(init_from=reports[-1].folder) if place else run))
        return reports

    def apart(self, recipe: Any):
        """A module for each task, and behind it the selector. Returns the report behind each task."""
        reports, modules = [], {}
        for place, name in enumerate(self.tasks):
            run = self.sampled(recipe, place, 0)
            if not place:
                # one task needs no selector
                report = yield self.measured(run, {name: None})
                modules[name] = str(report.folder)
                reports.append(report)
                continue
            report = yield run
            modules[name] = str(report.folder)
            run = self.sampled(recipe, place, self.replay).but(**self.selector)
            run = run.but(stages=[*run.stages, {"name": "task_names", "column": self.column}])
            if place > 1:
                run = run.but(init_from=reports[-1].folder)
            reports.append((yield self.measured(run.but(evaluate=[]), dict(modules))))
        return reports

    def sampled(self, recipe: Any, place: int, replay: int) -> Any:
        """The recipe on the rows of a task and a memory of those before it."""
        name, earlier = self.tasks[place], self.tasks[:place] if replay else ()
        counts = {name: EVERY}
        for k, old in enumerate(earlier):
            counts[old] = replay // place + (k < replay % place)
        quotas = {"name": "quotas", "column": self.column, "counts": counts, "cap": 0}
        mixture = {"name": "capped_mixture", "task": self.column, "cap": 1, "rows": self.rows}
        mixture["weights"] = {name: self.ratio * max(1, len(earlier))}
        return recipe.but(stages=[quotas, *(recipe.stages or ()), mixture])

    def measured(self, recipe: Any, modules: dict[str, str | None]) -> Any:
        """The recipe with the accuracy of these modules at its end."""
        measure = {"name": "task_modules", "modules": modules, "column": self.column}
        shared = all(folder is None for folder in modules.values())
        measure["top_k"] = len(modules) if shared else self.top_k
        measure["weighted"] = self.weighted and not shared
        return recipe.but(evaluate=[*(recipe.evaluate or ()), measure])

    def summarize(self, reports: Sequence[Any]) -> None:
        """Puts table, numbers and sentences into the last report."""
        last, table, matrix = reports[-1], [], [[0.0] * len(self.tasks)]
        for place, report in enumerate(reports):
            scores = [self.score(report, name) for name in self.tasks[: place + 1]]
            matrix.append([*scores, *[0.0] * (len(self.tasks) - len(scores))])
            line = {"after": self.tasks[place], "whole": float(report.after[METRIC])}
            line["average"] = sum(scores) / len(scores)
            table.append({**line, **dict(zip(self.tasks, scores, strict=False))})
        last.stats["table"] = table
        last.stats["continual"] = {
            "whole_accuracy": table[-1]["whole"],
            "average_accuracy": average_accuracy(matrix),
            "forgetting": forgetting(matrix),
        }
        last.notes.append(
            f"after {len(self.tasks)} tasks: average {average_accuracy(matrix):.3f},"
            f" forgetting {forgetting(matrix):.3f}"
        )

    def score(self, report: Any, name: str) -> float:
        """The accuracy on a task. Raises RecipeError where it has no held-out rows."""
        try:
            return float(report.after[f"{METRIC}/{name}"])
        except KeyError:
            raise RecipeError(
                f"no held-out row has {self.column} '{name}'; give each source of `eval_data` its name, e.g."
                " {path: ..., source: " + name + "}"
            ) from None
