"""data_scaling: the fit on curves that are a law, a step or flat, and the runs of the plan."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from luthier.errors import RecipeError
from luthier.methods.plans.studies.data_scaling import DataScaling, power_law
from luthier.recipe.recipe import Recipe

SIZES = [100, 300, 1000, 3000, 10_000, 30_000]


def test_it_recovers_exponents_and_sees_steps():
    rng = np.random.default_rng(0)
    covered = 0
    for k in range(50):
        b = 0.2 + 0.6 * k / 50
        noise = np.exp(0.02 * rng.standard_normal(len(SIZES)))
        law = power_law(SIZES, 2.0 * np.array(SIZES, float) ** -b * noise)
        assert law["exponent"] == pytest.approx(b, rel=0.1) and law["r2"] > 0.95
        covered += law["low"] <= b <= law["high"]
    assert covered >= 42  # of 95 % intervals
    exact = power_law(SIZES, [3.0 * size**-0.4 for size in SIZES])
    assert exact["exponent"] == pytest.approx(0.4) and exact["scale"] == pytest.approx(3.0)
    step = power_law(SIZES, [0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    assert step["r2"] < 0.85 < exact["r2"]


def test_nothing_where_rows_do_not_matter():
    """Of 50 flat curves about one in twenty has an interval without 0."""
    rng = np.random.default_rng(1)
    laws = [power_law(SIZES, 0.5 * np.exp(0.1 * rng.standard_normal(len(SIZES)))) for _ in range(50)]
    assert sum(law["low"] > 0 or law["high"] < 0 for law in laws) <= 8


def test_it_is_polyfit():
    errors = [0.5, 0.42, 0.3, 0.28, 0.2, 0.11]
    slope, intercept = np.polyfit(np.log(SIZES), np.log(errors), 1)
    law = power_law(SIZES, errors)
    assert law["exponent"] == pytest.approx(-slope) and law["scale"] == pytest.approx(np.exp(intercept))


def test_runs_are_nested_and_the_law_is_reported():
    def played(errors, **settings):
        """The plan with runs that measured these."""
        generator = DataScaling(sizes=[10, 100, 1000], **settings).recipes(
            Recipe(model="m", stages=["pairs"])
        )
        arms = next(generator)
        runs = [SimpleNamespace(after=error, stats={}, notes=[]) for error in errors]
        with pytest.raises(StopIteration) as end:
            generator.send(runs)
        return arms, end.value.value

    arms, report = played([{"loss": 4 * size**-0.5} for size in (10, 100, 1000)])
    stages = [arm.stages for arm in arms]
    assert stages == [[{"name": "random_rows", "n": n}, "pairs"] for n in (10, 100, 1000)]
    assert report.stats["power_law"]["exponent"] == pytest.approx(0.5)
    assert [line["rows"] for line in report.stats["table"]] == [10, 100, 1000]
    assert "0.707 times the error" in report.notes[0]
    _, report = played([{"accuracy": value} for value in (0.2, 0.6, 0.8)], metric="accuracy", share=True)
    assert report.stats["table"][1]["error"] == pytest.approx(0.4)
    _, report = played([{"accuracy": value} for value in (0.2, 0.6, 1.0)], metric="accuracy", share=True)
    assert "power_law" not in report.stats and "no error" in report.notes[0]
    with pytest.raises(RecipeError, match="ascending"):
        DataScaling(sizes=[100, 10, 1000])
