"""lae: the offline module through a stream, under every tuner, and that both together forget less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.storage import checkpoints

TASKS = ["a", "b", "c"]
ANSWERS = ["xo", "mu", "ka", "ri"]


@pytest.mark.parametrize("tuner", ["lora", "prefix", "pfeiffer"])
def test_it_is_made_for_every_tuner(tuner):
    reports = [report(f"run-{k}", **{f"joint_accuracy/{name}": 0.5 for name in TASKS}) for k in range(3)]
    for one in reports:
        one.before = dict(one.after)
    plan = {"name": "lae", "tasks": TASKS, "momentum": 0.9}
    requests, _ = played(plan, Recipe.load({"tuner": tuner}), reports)
    offline = [one.roles["offline"] for one in requests]
    assert [one["momentum"] for one in offline] == [0.0, 0.9, 0.9]
    assert [one.get("goes_on_from") for one in offline] == [None, "run-0", "run-1"]
    assert all(one.tuner == Recipe.load({"tuner": tuner}).tuner for one in requests)
    for recipe, later in (({"roles": {"offline": "initial"}}, {}), ({}, {"roles": {"reference": "initial"}})):
        with pytest.raises(RecipeError, match="sets the role 'offline' by itself"):
            played({**plan, "later": later}, Recipe.load(recipe), reports)


def stream(model, folder, tasks, steps, **plan):
    rows = [
        {"prompt": f"{task}{k}:", "completion": ANSWERS[(k + task) % 4], "source": str(task)}
        for task in range(tasks)
        for k in range(4)
    ]
    recipe = {"data": rows, "eval_data": rows, "max_steps": steps, "learning_rate": 1e-2}
    recipe |= {"per_device_train_batch_size": 4, "save_steps": steps, "tuner": {"name": "lora", "r": 4}}
    plan = {"name": "lae", "tasks": [str(task) for task in range(tasks)], **plan}
    return luthier.tune(recipe_of(model) | recipe | {"plan": plan}, folder=folder)


def ends(done):
    """Online and offline values of a tensor behind every run."""
    every = []
    for run in done.runs:
        tensors = checkpoints.load(checkpoints.paths(Path(run))[-1]).tensors
        name = next(n for n in tensors if n.endswith(".B") and not n.startswith("role:"))
        every.append((tensors[name], tensors["role:offline.average." + name.replace(".", "/")]))
    return every


@pytest.mark.long
def test_the_offline_module_goes_through_the_stream(shallow, tmp_path):
    (first, copied), (second, slow), (third, slower) = ends(stream(shallow, tmp_path, 3, 1, momentum=0.75))
    assert torch.equal(first, copied), "the first task's module is copied"
    torch.testing.assert_close(slow, 0.75 * first + 0.25 * second)
    torch.testing.assert_close(slower, 0.75 * slow + 0.25 * third)


@pytest.mark.slow
def test_it_forgets_less_than_the_online_module_alone(shallow, tmp_path):
    numbers = {}
    for momentum in (0.0, 0.98):
        done = stream(shallow, tmp_path / str(momentum), 5, 24, momentum=momentum)
        numbers[momentum] = done.stats["continual"]
    assert numbers[0.98]["forgetting"] < numbers[0.0]["forgetting"] - 0.05, numbers
