"""ibcl: what each run starts from, mixtures by hand, what a task that comes again stores, and preferences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.methods.estimators.first_order._posterior import Posterior, distance, mixture
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage.layout import read_log


def test_runs_start_from_the_posteriors_of_the_task_before():
    reports = [[report(f"{task}{j}") for j in range(2)] for task in "abc"]
    settings = {"name": "ibcl", "tasks": list("abc"), "prior_sigmas": [0.1, 0.4], "preference": [0.5, 0.5, 0]}
    recipe = Recipe.load({"estimator": {"name": "variational", "kl_weight": 0.5}})
    runs, last = played(settings, recipe, [*reports, report("end")])
    *learned, final = runs
    assert [[run.init_from for run in some] for some in learned] == [[None, None], ["a0", "a1"], ["b0", "b1"]]
    for task, some in zip("abc", learned, strict=True):
        assert [run.estimator["prior_sigma"] for run in some] == [0.1, 0.4]
        assert all(run.estimator["kl_weight"] == 0.5 for run in some)
        assert all(run.stages[0]["counts"].keys() == {task} for run in some)
    assert final.max_steps == 0 and final.init_from["of"] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert final.init_from["merge"]["weights"] == [0.25, 0.25, 0.25, 0.25, 0, 0]
    assert final.evaluate[-1]["posteriors"] == {"a": ["a0", "a1"], "b": ["b0", "b1"], "c": ["c0", "c1"]}
    assert last.stats["ibcl"]["runs"] == 6
    for wrong, match in (
        ({"preferences": [[1, 0]]}, "a weight for each of the 3 tasks"),
        ({"preference": [0.5, 0.6, 0]}, "their sum is 1"),
        ({"tasks": ["a", "a"]}, "each can be there once"),
    ):
        with pytest.raises(RecipeError, match=match):
            build("plan", settings | wrong)
    with pytest.raises(RecipeError, match="the recipe has 'sam'"):
        played(settings, Recipe.load({"estimator": "sam"}), reports)


def gaussian(seed: int) -> Posterior:
    rng = torch.Generator().manual_seed(seed)
    mean = {"A": torch.randn(3, 2, generator=rng).double(), "count": torch.tensor(4)}
    return Posterior(mean, {"A": torch.rand(3, 2, generator=rng).double(), "count": torch.zeros(()).double()})


def test_mixtures_are_weighted_means():
    some = [gaussian(seed) for seed in range(4)]
    one = mixture(some, [0, 1, 0, 0])
    assert torch.equal(one.mean["A"], some[1].mean["A"]) and torch.equal(one.sigma["A"], some[1].sigma["A"])
    weights = [0.35, 0.35, 0.15, 0.15]  # a preference of 0.7 and 0.3 with two posteriors each
    mixed = mixture(some, weights)
    for own, parts in ((mixed.mean, "mean"), (mixed.sigma, "sigma")):
        terms = [w * getattr(p, parts)["A"] for p, w in zip(some, weights, strict=True)]
        by_hand = torch.stack(terms).sum(0)
        assert torch.allclose(own["A"], by_hand, atol=1e-6)
    assert torch.equal(mixed.mean["count"], torch.tensor(4))
    with pytest.raises(RecipeError, match="sum to 1"):
        mixture(some, [0.5, 0.5, 0.5, 0])
    a, b = some[:2]
    squares = (a.mean["A"] - b.mean["A"]).square() + (a.sigma["A"] - b.sigma["A"]).square()
    assert distance(a, b) == pytest.approx(float(squares.mean().sqrt()))
    assert distance(a, a) == 0


CLASSES = ["xo", "mu", "ka", "ri"]


def rows_of(task: str, shift: int) -> list[dict]:
    """Four inputs that all tasks share; each task gives them other classes."""
    rows = []
    for k in range(4):
        rows.append({"prompt": f"{k}:", "completion": CLASSES[(k + shift) % 4], "source": task})
    return rows


def stream(model, folder, rows, steps, **settings):
    recipe = {
        "data": rows,
        "eval_data": rows,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "evaluate": ["loss"],
    }
    recipe |= {"per_device_train_batch_size": 4, "save_steps": steps, "tuner": {"name": "lora", "r": 4}}
    return luthier.tune(recipe_of(model) | recipe | {"plan": {"name": "ibcl", **settings}}, folder=folder)


@pytest.mark.long
def test_a_task_that_comes_again_stores_nothing(shallow, tmp_path):
    """The same rows under another name, from the posterior of the first: nothing is far from it."""
    rows = [*rows_of("a", 0), *rows_of("b", 0)]
    settings = {"tasks": ["a", "b"], "prior_sigmas": [0.5], "distance": 0.014}
    done = stream(shallow, tmp_path / "same", rows, 60, **settings)
    assert [line["posteriors"] for line in done.stats["table"]] == [1, 1]
    done = stream(shallow, tmp_path / "other", [*rows_of("a", 0), *rows_of("b", 1)], 60, **settings)
    assert [line["posteriors"] for line in done.stats["table"]] == [1, 2]


@pytest.mark.long
def test_preferences_need_no_training(shallow, tmp_path):
    """Eleven preferences over three tasks: as many runs as tasks and priors, and one that makes no step."""
    rows = [*rows_of("a", 0), *rows_of("b", 1), *rows_of("c", 2)]
    preferences = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0.2, 0], [0.8, 0, 0.2], [0.2, 0.8, 0]]
    preferences += [[0, 0.8, 0.2], [0.2, 0, 0.8], [0, 0.2, 0.8], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]]
    settings = {"tasks": list("abc"), "prior_sigmas": [0.3], "preferences": preferences, "distance": 0.0}
    done = stream(shallow, tmp_path / "run", rows, 40, **settings)
    steps = [len(read_log(Path(run))) for run in done.runs]
    assert sorted(steps) == [0, 40, 40, 40]
    names = [name for name in done.after if name.startswith("preference_accuracy/")]
    assert len(names) == 11
    assert done.after["preference_accuracy"] > done.after["equal_accuracy"] + 0.1
