"""Learned soup: tunes one model in several ways, then learns how much of each run goes into the average.

The shares are the softmax of one number for each run, all equal at first, and descend the held-out metric.
Its gradient is taken by differences, with one evaluation for each run and one for the step, which needs one
model in memory and works for every tuner (the authors back-propagate through all models at once). A step that
does not improve the metric is halved. The rows that decide are learned from: keep others for the final
evaluation. Departs: one share for each run (for shares by layer, `average` takes `by_layer`), and no
temperature, which rescales logits: greedy answers stay, the loss would not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import measured
from luthier.methods.plans.merging._soup import Soup
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2203.05482",
    row="model-soups",
    use_when="you tuned in a few ways anyway and an even or a greedy average is not the best one.",
    costs="one run for each ingredient, and for each step as many evaluations as there are ingredients, and"
    " one more.",
    covers="one share for each run, learned by descent on the held-out metric.",
    omits="shares by layer and a temperature are not learned; the gradient is taken by differences.",
    tests=["methods/plans/merging/test_learned_soup.py::test_shares_descend_to_the_minimum"],
)
class LearnedSoup(Soup):
    """Each run is a set of changes to the recipe, such as {learning_rate: 1e-4}; only averages are merged."""

    steps: Annotated[int, Field(ge=1), Range(2, 16)] = 4  # steps of descent on the shares
    step_size: Annotated[float, Field(gt=0)] = 2.0  # length of the first step, in logits
    difference: Annotated[float, Field(gt=0)] = 0.3  # by which a logit is raised to see what changes

    def recipes(self, recipe):
        def soup(logits: Sequence[float]) -> Any:
            merge = {"name": "average", "weights": softmax(logits)}
            start = {"merge": merge, "of": folders}
            return recipe.but(init_from=start, objective=None, stages=[], online_stages=[])

        runs = yield self.runs(recipe)
        folders = [run.folder for run in runs]
        logits, size = [0.0] * len(runs), self.step_size
        best = yield soup(logits)
        for _ in range(self.steps):
            raised = []
            for i in range(len(runs)):
                raised.append([logit + self.difference * (i == k) for k, logit in enumerate(logits)])
            reports = yield [soup(vector) for vector in raised]
            gradient = [self.cost(report) - self.cost(best) for report in reports]
            length = math.sqrt(math.fsum(g * g for g in gradient))
            if not length:
                break
            step = [logit - size * g / length for logit, g in zip(logits, gradient, strict=True)]
            trial = yield soup(step)
            if self.cost(trial) < self.cost(best):
                logits, best = step, trial
            else:
                size /= 2
        # a run alone is a soup, too: the answer is never worse than the best of them
        answer = min([best, *runs], key=self.cost)
        shares = softmax(logits) if answer is best else [float(run is answer) for run in runs]
        changes = [", ".join(f"{k}: {v}" for k, v in some.items()) for some in self.of]
        table = []
        for change, share, run in zip(changes, shares, runs, strict=True):
            value = measured(run, self.metric)
            table.append({"run": change, "share": f"{share:.3f}", self.metric: f"{value:.4g}"})
        answer.stats["table"] = table
        return answer


def softmax(logits: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]
