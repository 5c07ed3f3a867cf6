"""private_texts: the private run alone reads private rows; the second learns from what it wrote."""

from __future__ import annotations

from helpers.plans import played, report


def test_private_rows_meet_the_private_run_alone(recipe):
    plan = {"name": "private_texts", "epsilon": 3.0, "n": 7, "labels": ["a"], "writer": {"max_steps": 5}}
    recipe = recipe.but(stages=[{"name": "random_rows", "n": 9}])
    requests, best = played(plan, recipe, [report("first"), report("second")])
    first, second = requests
    assert first.estimator == {"name": "dp_sgd", "target_epsilon": 3.0} and first.max_steps == 5
    assert [stage["name"] for stage in first.stages] == ["random_rows", "label_prefix"]
    assert [stage["name"] for stage in second.stages] == ["label_texts"]
    assert second.stages[0]["writer"] == "first" and second.stages[0]["labels"] == ["a"]
    assert second.estimator == recipe.estimator and "within epsilon 3" in best.notes[0]
