"""How good is a method of continual learning where its hyperparameters were not chosen on the stream that it
is judged on? Two streams of the same shape: one to tune on, one to report.

First every setting of every method learns the stream of `tuning` tasks, and the setting with the highest
average accuracy is chosen. Then the chosen settings, unchanged, learn the stream of `evaluation` tasks, of
which no class and no row was in the first, in several orders. The table has both: the score on the tuning
stream, which is what is usually reported, and on the other one, with the rank by each, seconds and trained
parameters (Cha and Cho, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError, quoted
from luthier.methods.plans._base import Plan
from luthier.registry import build, plan
from luthier.storage import files
from luthier.storage.layout import ROWS

STREAM = "stream"  # of a setting: what it changes in the plan `continual`


@plan(
    paper="arXiv:2403.09066",
    row="cl-hparam-reality",
    use_when="you compare methods of continual learning and want to know which is best where nobody could"
    " tune it: on tasks to come.",
    costs="a stream for each setting of each method, and one for each method and order.",
    covers="tuning on one stream and reporting on another of the same shape, several orders of tasks, ranks"
    " by both protocols, seconds and trained parameters; a task in both streams is refused, and so are rows"
    " that the runs of both read.",
    omits="the class-incremental methods of vision networks that the paper ranks; here a method is any set"
    " of changes to a recipe.",
    tests=[
        "methods/plans/studies/test_two_phase.py::test_a_brittle_method_leads_in_sample_alone",
        "methods/plans/studies/test_two_phase.py::test_tasks_and_rows_of_both_streams_are_refused",
        "methods/plans/studies/test_two_phase.py::test_the_score_is_that_of_the_chosen_settings",
    ],
)
class TwoPhase(Plan):
    """Streams (plan `continual`) of all settings, then of the chosen ones. The result is the last run of the
    method that is best on the stream it was not tuned on, in its first order.
    """

    tuning: tuple[str, ...] = ("None",)  # tasks of the stream to tune on, values of the column
    evaluation: tuple[str, ...] = ("other",)  # as many tasks of the stream to report
    # method -> its settings, each a set of changes to the recipe; `stream` changes the plan `continual`:
    # {replay: [{stream: {replay: 20}}, {stream: {replay: 20}, learning_rate: 1e-3}]}
    methods: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"naive": [{}]})
    column: str = "source"  # column that names the task of a row
    orders: Annotated[int, Field(ge=1)] = 1  # of the evaluation tasks; the first is as they are written

    def __post_init__(self):
        if len(self.tuning) != len(self.evaluation):
            raise RecipeError("tuning and evaluation: both streams must have the same number of tasks")
        if both := sorted({*self.tuning} & {*self.evaluation}):
            raise RecipeError(f"'{both[0]}' is in both streams: nothing may be tuned on what is reported")
        if not self.methods or not all(self.methods.values()):
            raise RecipeError("methods: each needs at least one setting, {} for the recipe as it is")

    def recipes(self, recipe):
        chosen, lines = {}, {}
        tuned_on: set[str] = set()  # the rows of the first stream
        for method, settings in self.methods.items():
            scores = []
            for setting in settings:
                report = yield from self.stream(recipe, setting, self.tuning, tuned_on, set())
                scores.append(self.score(report))
            best = max(range(len(settings)), key=scores.__getitem__)
            chosen[method] = settings[best]
            lines[method] = {"method": method, "setting": best, "in sample": scores[best]}
        first: dict[str, Any] = {}
        orders = self.task_orders(recipe.seed)
        for method, setting in chosen.items():
            reports = []
            for order in orders:
                report = yield from self.stream(recipe, setting, order, set(), tuned_on)
                reports.append(report)
            first[method] = reports[0]
            lines[method] |= self.summary(reports)
        table = ranked([*lines.values()])
        winner = min(table, key=lambda line: line["rank"])["method"]
        result = first[winner]
        result.stats["table"] = table
        result.stats["settings"] = {method: chosen[method] for method in self.methods}
        leader = min(table, key=lambda line: line["in-sample rank"])["method"]
        if leader != winner:
            result.notes.append(
                f"'{leader}' is best on the stream that it was tuned on, '{winner}' on the other one"
            )
        return result

    def stream(
        self, recipe: Any, setting: dict[str, Any], tasks: Sequence[str], rows: set[str], refused: set[str]
    ) -> Any:
        """The runs of one stream; returns its report. rows: get what the runs read. refused: rows that none
        of them may read.
        """
        changes = {key: value for key, value in setting.items() if key != STREAM}
        spec = {**setting.get(STREAM, {}), "name": "continual", "tasks": list(tasks), "column": self.column}
        play = build("plan", spec).recipes(recipe.but(**changes))
        request = next(play)
        while True:
            report = yield request
            read = rows_of(report)
            if shared := read & refused:
                raise RecipeError(
                    f"{len(shared)} rows of the tuning stream are in the other one, e.g."
                    f" {quoted(min(shared))}; stage 'deduplicate' or other files keep them apart"
                )
            rows |= read
            try:
                request = play.send(report)
            except StopIteration as end:
                return end.value

    def task_orders(self, seed: int) -> list[list[str]]:
        """Of the evaluation tasks."""
        orders = [list(self.evaluation)]
        for k in range(1, self.orders):
            drawn = torch.randperm(len(self.evaluation), generator=Clock(seed=seed).rng("order", k, at=0))
            orders.append([self.evaluation[i] for i in drawn.tolist()])
        return orders

    def score(self, report: Any) -> float:
        return float(report.stats["continual"]["average_accuracy"])

    def summary(self, reports: Sequence[Any]) -> dict[str, float]:
        """Of one method's streams of evaluation tasks."""
        scores = [self.score(report) for report in reports]
        line = {"score": fmean(scores)}
        if len(scores) > 1:
            line["error"] = stdev(scores) / math.sqrt(len(scores))
        for name, label in (("seconds", "seconds of the last run"), ("moving", "trained parameters")):
            if name in reports[0].stats:
                line[label] = reports[0].stats[name]
        return line


def rows_of(report: Any) -> set[str]:
    """The texts of the rows that a run was trained on; none where it stored none."""
    path = Path(report.folder) / ROWS
    if not path.is_file():
        return set()
    return {f"{row['prompt']} {row.get('completions')}" for row in files.read_rows(path)}


def ranked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines with their rank by both scores, 1 the highest; of equals the earlier first."""
    for column, rank in (("in sample", "in-sample rank"), ("score", "rank")):
        order = sorted(range(len(lines)), key=lambda k: -lines[k][column])
        for place, k in enumerate(order):
            lines[k][rank] = place + 1
    return lines
