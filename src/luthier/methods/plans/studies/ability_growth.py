"""How each ability grows with its rows: one run for each ability and number of rows, scored on all abilities.

Numbers of rows lie on a geometric grid and smaller sets are part of larger ones (stage `quotas`). The table
has the score on each ability, so that the lines at equal rows are the transfer matrix. Of each ability follow
its responsiveness, the slope of its own score over the logarithm of rows, and its saturation, the smallest
number that reaches 95% of the largest gain (Song et al., 2023). With `budget` the rows are then shared out:
each goes where the curves, made concave, still gain most, and this mix is run beside one of equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import plan


@plan(
    paper="arXiv:2310.19651",
    row="doit-ability-growth",
    use_when="rows teach several abilities (column `source`) and you ask how many of each are worth their"
    " while.",
    costs="a run for each ability and number of rows, and two more with a budget.",
    covers="nested sets on a geometric grid, score against rows by ability, responsiveness, saturation, the"
    " transfer matrix, a mix by the curves beside an equal one.",
    omits="the ten abilities' own rows and questions, and the comparison of sizes of models: `luthier"
    " compare`.",
    tests=[
        "methods/plans/studies/test_ability_growth.py::test_a_planted_saturation_is_recovered",
        "methods/plans/studies/test_ability_growth.py::test_sets_are_nested_and_the_table_is_the_transfer_matri"
        "x",
        "methods/plans/studies/test_ability_growth.py::test_a_mix_by_the_curves_is_no_worse_than_equal_parts",
    ],
)
class AbilityGrowth(Plan):
    """A run for each ability and number of rows. The best mean score is the plan's result."""

    abilities: tuple[str, ...] = ("None",)  # values of the column; rows without it are of ability None
    sizes: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 4, 16, 64, 256, 1000)  # rows, ascending
    column: str = "source"  # column that names the ability of a row
    metric: str = "source_accuracy"  # the score, by source; higher is better
    budget: Annotated[int, Field(ge=1)] | None = None  # rows of a mix that is made from the curves

    def recipes(self, recipe):
        recipe = recipe.but(evaluate=[*(recipe.evaluate or ()), {"name": "by_source", "column": self.column}])
        cells = [(ability, n) for ability in self.abilities for n in self.sizes]
        reports = yield [self.with_counts(recipe, {ability: n}) for ability, n in cells]
        table: list[dict[str, Any]] = []
        curves: dict[str, list[float]] = {name: [] for name in self.abilities}
        for (ability, n), report in zip(cells, reports, strict=True):
            scores = self.scores(report.after)
            table.append({"ability": ability, "rows": n, **scores})
            curves[ability].append(scores[ability])
        every = list(reports)
        base = self.scores(reports[0].before)
        if self.budget is not None:
            mixes = {"mix by curves": allocation(self.sizes, curves, base, self.budget)}
            mixes["mix of equal parts"] = dict.fromkeys(self.abilities, self.budget // len(self.abilities))
            mixed = yield [self.with_counts(recipe, counts) for counts in mixes.values()]
            for (name, counts), report in zip(mixes.items(), mixed, strict=True):
                table.append({"ability": name, "rows": sum(counts.values()), **self.scores(report.after)})
            every += mixed
        best = max(every, key=lambda report: sum(self.scores(report.after).values()))
        best.stats["table"] = table
        best.stats["growth"] = growth = []
        for name, scores in curves.items():
            responsiveness = slope([math.log(n) for n in self.sizes], scores)
            saturated = saturation(self.sizes, scores, base[name])
            line = {"ability": name, "responsiveness": responsiveness, "saturation": saturated}
            growth.append(line)
            best.notes.append(
                f"{name}: {responsiveness:+.4f} a doubling of e in rows, saturated at {saturated}"
            )
        return best

    def with_counts(self, recipe: Any, counts: Mapping[str, int]) -> Any:
        """The recipe on so many rows of each ability."""
        stage = {"name": "quotas", "column": self.column, "counts": dict(counts), "cap": 0}
        return recipe.but(stages=[stage, *(recipe.stages or ())])

    def scores(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of each ability; 0 where it was not measured."""
        out = {}
        for name in self.abilities:
            value = metrics.get(f"{self.metric}/{name}")
            out[name] = 0.0 if value is None else float(value)
        return out


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; 0 where all x are alike."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if not spread:
        return 0.0
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def saturation(sizes: Sequence[int], scores: Sequence[float], base: float, share: float = 0.95) -> int:
    """The smallest size whose gain over `base` is a share of the largest."""
    goal = base + share * (max(scores) - base)
    for size, score in zip(sizes, scores, strict=True):
        if score >= goal:
            return size
    return sizes[-1]


def hull(sizes: Sequence[int], scores: Sequence[float], base: float) -> list[tuple[int, float]]:
    """(rows, score) of the least concave curve above the points, from no rows on."""
    points = [(0, base)]
    for point in zip(sizes, scores, strict=True):
        while len(points) > 1 and rise(points[-2], points[-1]) <= rise(points[-1], point):
            points.pop()
        points.append(point)
    return points


def rise(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Score a row between two points."""
    return (b[1] - a[1]) / (b[0] - a[0])


def allocation(
    sizes: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    base: Mapping[str, float],
    budget: int,
) -> dict[str, int]:
    """Rows of each ability, of sum `budget`: the steepest stretches of the curves first; what is left when no
    curve rises any more is shared out equally.
    """
    stretches = []
    for name, scores in curves.items():
        points = hull(sizes, scores, base.get(name, 0.0))
        for a, b in zip(points, points[1:], strict=False):
            stretches.append((rise(a, b), name, b[0] - a[0]))
    counts, left = dict.fromkeys(curves, 0), budget
    for gain, name, rows in sorted(stretches, key=lambda stretch: -stretch[0]):
        if gain <= 0:
            break
        taken = min(rows, left)
        counts[name] += taken
        left -= taken
    for place, name in enumerate(counts):
        counts[name] += left // len(counts) + (place < left % len(counts))
    return counts
