"""Many cheap labels or few good ones? A grid of both: each run learns weak labels first and goes on with good
ones, and of the grid stays what no other cell beats in cost and score.

The study of scalable elicitation (Mallen and Belrose, 2024) with its sequential fine-tuning. Rows name in a
column whether their label is weak or good; a cell costs weak rows * weak_cost + good rows * good_cost. Cells
with the same weak rows share the run that learns them. Where the front has weak labels alone, quantity
decides at this budget; good ones alone, quality; else the mixture does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.recipe.recipe import key_of
from luthier.registry import plan


@plan(
    paper="arXiv:2410.13215",
    row="label-quantity-quality",
    use_when="labels of two qualities have a price each, and you ask how to spend a budget.",
    costs="a run for each number of weak rows, and one for each cell with good rows.",
    covers="sequential fine-tuning over a grid of weak and good labels, their cost, the front of what is not"
    " dominated, and whether quantity, quality or the mixture decides at each of its budgets.",
    omits="weak labels themselves (rows bring them); good examples in the prompt, the log-confidence loss and"
    " the choice of good labels by uncertainty; that the sequence beats both pure options is not shown.",
    tests=[
        "methods/plans/studies/test_label_budget.py::test_the_front_is_what_brute_force_finds",
        "methods/plans/studies/test_label_budget.py::test_runs_share_weak_labels_and_the_table_has_their_cost",
    ],
)
class LabelBudget(Plan):
    """The cell with the highest score is the plan's result; its report has the grid as a table, and the
    front.
    """

    weak: str = "weak"  # value of the column for rows with cheap labels
    good: str = "good"  # value of the column for rows with good labels
    weak_rows: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 256, 1024)  # numbers of weak labels
    good_rows: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 32, 128)  # numbers of good labels
    weak_cost: Annotated[float, Field(gt=0)] = 1.0  # of a weak label
    good_cost: Annotated[float, Field(gt=0)] = 10.0  # of a good label
    column: str = "source"  # column that says which a row is
    metric: str = "accuracy"  # the score; higher is better
    # changes to the recipe for runs on good labels behind weak ones
    later: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for counts in (self.weak_rows, self.good_rows):
            if min(counts) < 0 or len({*counts}) < len(counts):
                raise RecipeError("label_budget: numbers of labels are 0 or more, each there once")
        if self.weak == self.good:
            raise RecipeError("label_budget: weak and good are two values of the column")
        if not self.cells():
            raise RecipeError("label_budget: no cell has any label")

    def recipes(self, recipe):
        numbers = [n for n in self.weak_rows if n]
        first: dict[int, Any] = {}
        if numbers:
            reports = yield [self.with_rows(recipe, self.weak, n) for n in numbers]
            first = dict(zip(numbers, reports, strict=True))
        mixed = [cell for cell in self.cells() if cell[1]]
        by_cell: dict[tuple[int, int], Any] = {(n, 0): report for n, report in first.items()}
        if mixed:
            reports = yield [self.second(recipe, first.get(weak), good) for weak, good in mixed]
            by_cell |= dict(zip(mixed, reports, strict=True))
        cells = [cell for cell in self.cells() if cell in by_cell]
        scores = [measured(by_cell[cell], self.metric) for cell in cells]
        costs = [self.cost(*cell) for cell in cells]
        best = by_cell[cells[max(range(len(cells)), key=scores.__getitem__)]]
        table = []
        for (weak, good), cost, score in zip(cells, costs, scores, strict=True):
            table.append({"weak": weak, "good": good, "cost": cost, self.metric: score})
        best.stats["table"] = table
        best.stats["label_front"] = [
            {**table[k], "decides": decisive(*cells[k])} for k in front(costs, scores)
        ]
        for line in best.stats["label_front"]:
            best.notes.append(
                f"at a cost of {line['cost']:g}: {line['weak']} weak and {line['good']} good labels,"
                f" {self.metric} {line[self.metric]:.3f} ({line['decides']})"
            )
        return best

    def cells(self) -> list[tuple[int, int]]:
        """(weak, good) numbers of labels, all but none of either."""
        return [(w, g) for w in self.weak_rows for g in self.good_rows if w or g]

    def cost(self, weak: int, good: int) -> float:
        """Of so many labels."""
        return weak * self.weak_cost + good * self.good_cost

    def with_rows(self, recipe: Any, source: str, count: int) -> Any:
        """The recipe on so many rows of one kind."""
        quotas = {"name": "quotas", "column": self.column, "counts": {source: count}, "cap": 0}
        return recipe.but(stages=[quotas, *(recipe.stages or ())])

    def second(self, recipe: Any, weak: Any, good: int) -> Any:
        """The run on good labels, behind that on weak ones where there is one."""
        run = self.with_rows(recipe, self.good, good)
        if weak is None:
            return run
        changes = {key_of(key): value for key, value in self.later.items()}
        for key in ("init_from", "data", "stages"):
            if key in changes:
                raise RecipeError(f"later: {key} belongs to the plan and cannot be changed")
        return run.but(init_from=weak.folder, **changes)


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Places of what nothing beats: no other costs no more and scores no less, with one of them better. By
    cost.
    """
    out: list[int] = []
    order = sorted(range(len(costs)), key=lambda k: (costs[k], -scores[k]))
    for k in order:
        equal = bool(out) and (costs[k], scores[k]) == (costs[out[-1]], scores[out[-1]])
        if not out or scores[k] > scores[out[-1]] or equal:
            out.append(k)
    return out


def decisive(weak: int, good: int) -> str:
    """What a cell of the front has spent its budget on."""
    if not good:
        return "quantity"
    return "mixture" if weak else "quality"
