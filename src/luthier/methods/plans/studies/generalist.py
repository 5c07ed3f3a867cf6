"""Specialist or generalist: does broad instruction data help one task? A run for each number of the task's
rows and each ratio of general rows to them.

Each run sees the task's rows as often as the one without general rows: the number of epochs stays. `order:
mixed` trains on both at once, `first` on general rows alone and then on the task's. The table has the score
and what general rows added to it (Shi et al., 2023).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import plan


@plan(
    paper="arXiv:2310.15326",
    row="specialist-or-generalist",
    use_when="you tune for one task, have general instructions as well, and ask whether they help.",
    costs="a run for each number of rows and each ratio; with `order: first` one more for each ratio above"
    " 0.",
    covers="score by rows of the task and of general data, mixed or general data first, at equal exposure to"
    " the task; what general rows add.",
    omits="the paper's finding itself (gains for broad tasks with few rows, none for facts): it needs"
    " pretrained models of billions of parameters; facts of general rows are not checked.",
    tests=[
        "methods/plans/studies/test_generalist.py::test_the_grid_and_what_general_rows_add",
        "methods/plans/studies/test_generalist.py::test_general_rows_first",
    ],
)
class Generalist(Plan):
    """A grid of runs. The best by the metric is the plan's result."""

    specialist: str = "specialist"  # value of the column for the task's rows
    general: str = "general"  # and for general rows
    sizes: Annotated[tuple[int, ...], Field(min_length=1)] = (100, 1000, 10000)  # rows of the task
    ratios: Annotated[tuple[float, ...], Field(min_length=1)] = (
        0.0,
        0.5,
        1.0,
        2.0,
    )  # general rows a task's row
    column: str = "source"  # column that says which a row is
    order: Literal["mixed", "first"] = "mixed"  # general rows among the task's, or before them
    metric: str = "source_accuracy"  # the score, by source; higher is better

    def recipes(self, recipe):
        recipe = recipe.but(evaluate=[*(recipe.evaluate or ()), {"name": "by_source", "column": self.column}])
        cells = [(n, ratio) for n in self.sizes for ratio in self.ratios]
        if self.order == "mixed":
            runs = []
            for n, ratio in cells:
                counts = {self.specialist: n, self.general: round(ratio * n)}
                runs.append(self.with_counts(recipe, counts))
            reports = yield runs
        else:
            reports = []
            for n, ratio in cells:
                one = self.with_counts(recipe, {self.specialist: n})
                if ratio:
                    first = yield self.with_counts(recipe, {self.general: round(ratio * n)})
                    one = one.but(init_from=first.folder)
                report = yield one
                reports.append(report)
        table, alone = [], {}
        for (n, ratio), report in zip(cells, reports, strict=True):
            score = self.score(report)
            if ratio == min(self.ratios):
                alone[n] = score
            table.append({"task's rows": n, "general rows": round(ratio * n), self.metric: score})
        for (n, _), line in zip(cells, table, strict=True):
            line["added"] = line[self.metric] - alone.get(n, line[self.metric])
        best = max(reports, key=self.score)
        best.stats["table"] = table
        return best

    def with_counts(self, recipe: Any, counts: dict[str, int]) -> Any:
        stage = {"name": "quotas", "column": self.column, "counts": counts, "cap": 0}
        return recipe.but(stages=[stage, *(recipe.stages or ())])

    def score(self, report: Any) -> float:
        """On the task; 0 where it was not measured."""
        return float(report.after.get(f"{self.metric}/{self.specialist}") or 0.0)
