"""Greedy soup: tunes one model in several ways, then averages those that improve the average on held-out
rows.

Starting with the best run, each run joins the average if it does not make it worse. So the soup is never
worse than its best run on the rows that decide; keep other rows for the final evaluation. Evaluator
`ensemble` compares the runs' soup with the ensemble of their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    paper="arXiv:2203.05482",
    row="model-soups",
    use_when="you would tune several times anyway (other learning rates, seeds): averaging can beat"
    " the best run, and inference costs one model.",
    costs="one run for each ingredient, and one evaluation for each average.",
    covers="the greedy soup, on any metric.",
    tests=[
        "methods/plans/merging/test_greedy_soup.py::test_a_greedy_soup_takes_what_helps",
        "methods/plans/merging/test_greedy_soup.py::test_a_greedy_soup_is_never_worse_than_its_best_ingredient",
    ],
)
class GreedySoup(Plan):
    """Each run is a set of changes to the recipe, such as {learning_rate: 1e-4}; only averages are merged."""

    of: list[dict[str, Any]]  # changes to the recipe, one set per run
    metric: str = "loss"  # metric that decides
    greater_is_better: bool = False  # whether a higher metric is better

    def __post_init__(self):
        if len(self.of) < 2:
            raise ValueError("of: greedy_soup needs at least two runs")

    def recipes(self, recipe):
        check_held_out(self.name, recipe, self.of)

        def cost(report: Any) -> float:
            return (-1 if self.greater_is_better else 1) * measured(report, self.metric)

        runs = sorted((yield [recipe.but(**changes) for changes in self.of]), key=cost)
        soup, best = runs[:1], runs[0]
        for run in runs[1:]:
            merged = {"merge": "average", "of": [r.folder for r in (*soup, run)]}
            trial = yield recipe.but(init_from=merged, objective=None, stages=[], online_stages=[])
            if cost(trial) <= cost(best):
                soup, best = [*soup, run], trial
        return best


def check_held_out(name: str, recipe: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Raises RecipeError where runs with seeds of their own would hold out other rows."""
    by_chance = recipe.eval_data == "auto" or isinstance(recipe.eval_data, (int, float))
    if by_chance and any("seed" in changes for changes in runs):
        raise RecipeError(
            f"plan '{name}': with other seeds, other rows would be held out; set eval_data to a file"
        )
