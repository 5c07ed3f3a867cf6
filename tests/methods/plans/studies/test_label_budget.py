"""label_budget: the front by brute force, and which runs there are."""

from __future__ import annotations

import pytest
import torch

from helpers.plans import report
from luthier.errors import RecipeError
from luthier.methods.plans.studies.label_budget import LabelBudget, front
from luthier.recipe.recipe import Recipe


def better(costs, scores, j, k) -> bool:
    no_worse = costs[j] <= costs[k] and scores[j] >= scores[k]
    return no_worse and (costs[j] < costs[k] or scores[j] > scores[k])


def test_the_front_is_what_brute_force_finds():
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        costs = torch.randint(0, 8, (12,), generator=rng).tolist()
        scores = torch.randint(0, 8, (12,), generator=rng).tolist()
        brute = {k for k in range(12) if not any(better(costs, scores, j, k) for j in range(12))}
        places = front(costs, scores)
        assert {*places} == brute and [costs[k] for k in places] == sorted(costs[k] for k in places)


def test_runs_share_weak_labels_and_the_table_has_their_cost():
    plan = LabelBudget(weak_rows=(0, 100), good_rows=(0, 10), later={"learning_rate": 1e-5})
    play = plan.recipes(Recipe.load({}))
    (weak,) = next(play)
    assert weak.stages[0]["counts"] == {"weak": 100} and weak.init_from is None
    alone, behind = play.send([report("w", accuracy=0.7)])
    assert alone.stages == behind.stages and alone.stages[0]["counts"] == {"good": 10}
    assert (alone.init_from, behind.init_from, behind.learning_rate) == (None, "w", 1e-5)
    with pytest.raises(StopIteration) as end:
        play.send([report("g", accuracy=0.6), report("wg", accuracy=0.9)])
    best = end.value.value
    assert best.folder == "wg"
    lines = [(line["weak"], line["good"], line["cost"]) for line in best.stats["table"]]
    assert lines == [(0, 10, 100.0), (100, 0, 100.0), (100, 10, 200.0)]
    decides = [(line["cost"], line["decides"]) for line in best.stats["label_front"]]
    assert decides == [(100.0, "quantity"), (200.0, "mixture")]
    for wrong in ({"weak": "good"}, {"weak_rows": (0,), "good_rows": (0,)}, {"weak_rows": (5, 5)}):
        with pytest.raises(RecipeError):
            LabelBudget(**wrong)
