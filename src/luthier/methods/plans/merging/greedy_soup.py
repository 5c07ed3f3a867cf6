"""Greedy soup: tunes one model in several ways, then averages those that improve the average on held-out
rows.

Starting with the best run, each run joins the average if it does not make it worse. So the soup is never
worse than its best run on the rows that decide; keep other rows for the final evaluation. Evaluator
`ensemble` compares the runs' soup with the ensemble of their logits.
"""

from __future__ import annotations

from luthier.methods.plans.merging._soup import Soup
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
class GreedySoup(Soup):
    """Each run is a set of changes to the recipe, such as {learning_rate: 1e-4}; only averages are merged."""

    def recipes(self, recipe):
        runs = sorted((yield self.runs(recipe)), key=self.cost)
        soup, best = runs[:1], runs[0]
        for run in runs[1:]:
            merged = {"merge": "average", "of": [r.folder for r in (*soup, run)]}
            trial = yield recipe.but(init_from=merged, objective=None, stages=[], online_stages=[])
            if self.cost(trial) <= self.cost(best):
                soup, best = [*soup, run], trial
        return best
