"""How many rows does a model need to reach a score, and how many fewer one that was instruction-tuned? The
same rows in growing numbers for several starts.

For each start (changes to the recipe, such as another model) a run for each number of rows, smaller ones
part of the larger. Rows needed are where the line through (rows, score) first reaches the reference, as of
full supervision (Gupta et al., 2023). Beside it stands by how much each start differs from the first one at
equal rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    paper="arXiv:2306.05539",
    row="instruction-tuned-quick-learners",
    use_when="you ask how many rows of a task another start, such as an instruction-tuned model, would save.",
    costs="a run for each start and number of rows.",
    covers="curves of score over rows for any starts on the same nested rows, the rows at which each reaches"
    " a reference by interpolation, and the difference at equal rows.",
    omits="the 119 tasks with their definitions and examples, scores by category, one model for each task"
    " beside one for all; that instruction tuning saves rows is not shown.",
    tests=[
        "methods/plans/studies/test_sample_efficiency.py::test_rows_needed_by_hand",
        "methods/plans/studies/test_sample_efficiency.py::test_starts_read_the_same_rows",
    ],
)
class SampleEfficiency(Plan):
    """The best run on most rows is the plan's result; its report has the table."""

    # name of a start -> changes to the recipe; the others are compared with the first
    starts: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = field(
        default_factory=lambda: {"base": {}}
    )
    sizes: Annotated[tuple[int, ...], Field(min_length=1)] = (16, 64, 256, 1024)  # training rows, ascending
    reference: float | None = None  # the score to reach; if not given, that of the first start on most rows
    metric: str = "accuracy"  # the score; higher is better

    def __post_init__(self):
        if list(self.sizes) != sorted({*self.sizes}) or self.sizes[0] < 1:
            raise RecipeError("plan 'sample_efficiency': sizes are ascending numbers of rows")

    def recipes(self, recipe):
        arms = []
        for changes in self.starts.values():
            start = recipe.but(**changes)
            for size in self.sizes:  # drawn in one order: smaller subsets are part of larger ones
                arms.append(start.but(stages=[{"name": "random_rows", "n": size}, *(start.stages or [])]))
        reports = yield arms
        curves: dict[str, list[float]] = {}
        count = len(self.sizes)
        for place, name in enumerate(self.starts):
            own = reports[place * count : (place + 1) * count]
            curves[name] = [measured(report, self.metric) for report in own]
        last = max(reports[count - 1 :: count], key=lambda report: measured(report, self.metric))
        first = next(iter(curves.values()))
        reference = first[-1] if self.reference is None else self.reference
        table = []
        for name, scores in curves.items():
            for size, score, other in zip(self.sizes, scores, first, strict=True):
                table.append({"start": name, "rows": size, self.metric: score, "added": score - other})
        last.stats["table"] = table
        last.stats["rows_needed"] = needed = {}
        for name, scores in curves.items():
            needed[name] = rows_needed(self.sizes, scores, reference)
            how = "not reached" if needed[name] is None else f"reached with {needed[name]:.0f} rows"
            last.notes.append(f"{name}: {self.metric} {reference:.3f} {how}")
        return last


def rows_needed(sizes: Sequence[float], scores: Sequence[float], reference: float) -> float | None:
    """Where the line through the points first reaches the reference; None where none of them does."""
    for k, score in enumerate(scores):
        if score < reference:
            continue
        if not k:
            return float(sizes[0])
        part = (reference - scores[k - 1]) / (score - scores[k - 1])
        return sizes[k - 1] + part * (sizes[k] - sizes[k - 1])
    return None
