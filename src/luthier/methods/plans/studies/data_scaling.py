"""How a metric improves with the number of training rows: runs on nested subsets, and a power law through
them.

The error of the run on D rows is fitted as c * D^-b by least squares of logarithms, with an interval of b
and R^2: low where there is a step instead of a law (Raghavendra et al., 2024). Objective metrics such as
exact answers go on improving with rows where style is learnt after a few hundred. Departs: hyperparameters
are the recipe's at every size, and errors are not told apart by kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    paper="arXiv:2410.03717",
    row="post-training-power-law",
    use_when="you ask how much more rows would bring before you pay for them.",
    costs="one run for each of `sizes`.",
    covers="runs on nested subsets of the rows, and the power law of the error with interval and R^2.",
    omits="tuning of hyperparameters at each size, errors of style and of reasoning apart, and the test of"
    " new"
    " facts.",
    tests=[
        "methods/plans/studies/test_data_scaling.py::test_it_recovers_exponents_and_sees_steps",
        "methods/plans/studies/test_data_scaling.py::test_runs_are_nested_and_the_law_is_reported",
    ],
)
class DataScaling(Plan):
    """One run for each of `sizes`, each with the rows of the smaller ones among its own. The result is the
    run on most rows; its report has the table and the law.
    """

    sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])  # training rows, ascending
    metric: str = "loss"  # metric whose error falls
    # is the metric a share of right answers? Then its error is 1 minus it
    share: bool = False

    def __post_init__(self):
        if len(self.sizes) < 3 or self.sizes != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise RecipeError("plan 'data_scaling': sizes are three or more ascending numbers of rows")

    def recipes(self, recipe):
        arms = []
        for size in self.sizes:  # drawn in one order: smaller subsets are part of larger ones
            arms.append(recipe.but(stages=[{"name": "random_rows", "n": size}, *(recipe.stages or [])]))
        runs = yield arms
        errors = []
        for run in runs:
            value = measured(run, self.metric)
            errors.append(1 - value if self.share else value)
        table: list[dict[str, Any]] = []
        for size, error in zip(self.sizes, errors, strict=True):
            table.append({"rows": size, self.metric: 1 - error if self.share else error, "error": error})
        last = runs[-1]
        last.stats["table"] = table
        if min(errors) <= 0:
            last.notes.append(f"{self.metric} leaves no error at some size, so no power law is fitted")
            return last
        law = power_law(self.sizes, errors)
        last.stats["power_law"] = law
        last.notes.append(
            f"error of {self.metric} = {law['scale']:.3g} * rows^-{law['exponent']:.3g} (95 % interval of the"
            f" exponent {law['low']:.3g} to {law['high']:.3g}, R^2 {law['r2']:.3f});"
            f" twice the rows: {2 ** -law['exponent']:.3f} times the error"
        )
        return last


def power_law(sizes: Sequence[float], errors: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Rows and errors above 0 -> scale c and exponent b of c * D^-b by least squares of logarithms, the
    interval of b by Student's t, and R^2 in logarithms. Raises ValueError for fewer than three sizes.
    """
    from scipy.stats import t

    if len(sizes) < 3 or min(sizes) <= 0 or min(errors) <= 0:
        raise ValueError("a power law needs three sizes or more, and sizes and errors above 0")
    x, y = [math.log(size) for size in sizes], [math.log(error) for error in errors]
    n = len(x)
    centre, level_of_y = sum(x) / n, sum(y) / n
    spread = sum((value - centre) ** 2 for value in x)
    slope = sum((a - centre) * (b - level_of_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = level_of_y - slope * centre
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((value - level_of_y) ** 2 for value in y)
    half = float(t.ppf((1 + level) / 2, n - 2)) * math.sqrt(rest / (n - 2) / spread)
    return {
        "scale": math.exp(intercept),
        "exponent": -slope,
        "low": -slope - half,
        "high": -slope + half,
        "r2": 1 - rest / total if total > 0 else 0.0,
    }
