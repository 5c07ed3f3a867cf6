"""optimizer_benchmark: profiles and medians by hand, and a plan played with curves that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from luthier.errors import RecipeError
from luthier.methods.plans.studies.optimizer_benchmark import (
    OptimizerBenchmark,
    areas,
    median_of_studies,
    profile,
    smoothed,
    steps_to,
)
from luthier.recipe.recipe import Recipe

TIMES = {"a": [10, 20, 30, 40], "b": [20, 10, math.inf, 80], "c": [10, 50, 60, math.inf]}


def test_profiles_and_areas_of_a_table():
    assert profile(TIMES, 1) == {"a": 0.75, "b": 0.25, "c": 0.25}
    assert profile(TIMES, 2) == {"a": 1.0, "b": 0.75, "c": 0.5}
    assert areas(TIMES) == pytest.approx({"a": 11 / 12, "b": 7 / 12, "c": 5 / 12})
    grid = np.linspace(1, 4, 30_001)
    for name, area in areas(TIMES).items():
        assert np.mean([profile(TIMES, t)[name] for t in grid[::100]]) == pytest.approx(area, abs=0.01)
    assert areas({"first": [1, 2], "never": [math.inf, math.inf]}) == {"first": 1.0, "never": 0.0}
    assert areas({"one": [math.inf], "other": [math.inf]}) == {"one": 0.0, "other": 0.0}


def test_the_median_of_the_best_trials():
    studies = [[9, 7, 8, 9, 9], [5, 5, 5, 5, 4], [math.inf] * 5, [6, 10, 6, 6, 6], [11, 3, 12, 13, 14]]
    assert median_of_studies(studies) == 6
    assert median_of_studies([[math.inf] * 5] * 3 + [[1] * 5] * 2) == math.inf


def test_steps_to_a_target():
    assert smoothed([4, 2, 0, 2], 2) == [3, 1, 1] and smoothed([1], 2) == []
    assert steps_to([3, 1, 1], 1) == 2 and steps_to([3, 1, 1], 0.5) == math.inf


def name_of(arm):
    return arm.optim if isinstance(arm.optim, str) else arm.optim["name"]


def played(settings, curve):
    """The plan on runs whose losses are `curve` of their recipe."""
    generator = OptimizerBenchmark(**settings).recipes(Recipe.load({"model": "m", "tuner": "lora"}))
    arms = next(generator)
    runs = [SimpleNamespace(losses=curve(arm), stats={}, notes=[], recipe=arm) for arm in arms]
    with pytest.raises(StopIteration) as end:
        generator.send(runs)
    return arms, end.value.value


def test_runs_targets_and_scores():
    """adamw falls three times as fast as lion; sgd never gets there."""
    speed = {"adamw": 0.03, "lion": 0.01, "sgd": 0.0}

    def curve(arm):
        return [1 - speed[name_of(arm)] * step for step in range(40)]

    settings = {"workloads": {"one": {}, "two": {"max_length": 64}}, "trials": 2, "window": 1}
    arms, result = played({**settings, "optimizers": ["lion", "adamw", "sgd"]}, curve)
    assert len(arms) == 12 and {arm.max_length for arm in arms[2:4]} == {64}
    assert name_of(result.recipe) == "adamw"
    lines = {line["optimizer"]: line for line in result.stats["table"]}
    assert [line["optimizer"] for line in result.stats["table"]] == ["adamw", "lion", "sgd"]
    assert result.stats["targets"]["one"] == pytest.approx(0.71)
    assert lines["lion"]["steps: one"] == 30 and lines["adamw"]["steps: two"] == 11
    assert lines["adamw"]["score"] == 1 and lines["lion"]["score"] == pytest.approx((4 - 30 / 11) / 3)
    assert lines["sgd"]["score"] == 0 and lines["sgd"]["steps: one"] is None
    assert "not reached" in result.notes[-1]


def test_one_rate_for_all_workloads():
    """Where rates decide, the best single one is at least as good as the default, and differs by workload."""

    def curve(arm):
        ideal = 1e-4 if arm.max_length == 64 else 1e-3
        slope = 0.02 / (1 + abs(math.log(arm.learning_rate / ideal)))
        return [1 - slope * step for step in range(50)]

    settings = {"workloads": {"one": {}, "two": {"max_length": 64}}, "trials": 3, "studies": 2}
    arms, result = played({**settings, "optimizers": ["adamw", "lion"]}, curve)
    rates = [arm.learning_rate for arm in arms]
    assert len(set(rates[:6])) == 6 and rates[:6] == rates[6:12] and rates[0] == 2e-4
    assert all(2e-5 <= rate <= 2e-3 for rate in rates[:12])
    for line in result.stats["table"]:
        assert 0 <= line["default"] <= line["one rate"] <= 1


def test_two_of_one_name_are_refused():
    with pytest.raises(RecipeError, match="twice"):
        OptimizerBenchmark(optimizers=["adamw", "adamw"])
