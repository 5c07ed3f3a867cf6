"""conpet: what each run starts from and reads, modules that stay, dynamic above static above sequential."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rows import recipe_of
from helpers.synthesis import nobody
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage import checkpoints

TASKS = ["a", "b", "c", "d"]


def reports(count=8, names=TASKS):
    scores = {f"routed_accuracy/{name}": 0.5 + k / 10 for k, name in enumerate(names)}
    return [report(f"run-{k}", routed_accuracy=0.6, **scores) for k in range(count)]


def play(**settings):
    return played({"name": "conpet", "tasks": TASKS, **settings}, Recipe.load({}), reports())


def measure(recipe):
    return next((one for one in recipe.evaluate or () if one["name"] == "task_modules"), None)


def test_modules_start_from_the_base_and_the_selector_goes_on():
    runs, last = play(top_k=2, weighted=True, selector={"learning_rate": 0.5})
    assert [run.init_from for run in runs] == [None, None, None, None, "run-2", None, "run-4"]
    assert [run.stages[-1]["name"] == "task_names" for run in runs] == [False] + [False, True] * 3
    assert [run.learning_rate == 0.5 for run in runs] == [False] + [False, True] * 3
    assert measure(runs[0])["modules"] == {"a": None} and measure(runs[1]) is None
    assert measure(runs[-1])["modules"] == {"a": "run-0", "b": "run-1", "c": "run-3", "d": "run-5"}
    assert measure(runs[-1])["top_k"] == 2 and measure(runs[-1])["weighted"]
    assert last.stats["continual"] == pytest.approx(
        {"whole_accuracy": 0.6, "average_accuracy": 0.65, "forgetting": 0.0}
    )
    assert [len(line) for line in last.stats["table"]] == [4, 5, 6, 7]
    runs, _ = play(dynamic=False, weighted=True)
    assert [run.init_from for run in runs] == [None, "run-0", "run-1", "run-2"]
    assert measure(runs[-1])["modules"] == dict.fromkeys(TASKS)
    assert measure(runs[-1])["top_k"] == 4 and not measure(runs[-1])["weighted"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_no_run_reads_more_rows_than_those_before(dynamic):
    """As many for every task; of what reads a memory half are new, and old tasks have equal shares."""
    data = [
        {"id": f"{name}{k}", "prompt": "", "completions": [name], "source": name}
        for name in TASKS
        for k in range(300)
    ]
    for settings, new, later in (({"rows": 900}, 900, 900), ({"replay": 120}, 300, 420)):
        for run in play(dynamic=dynamic, **settings)[0]:
            rows = data
            for one in run.stages:
                rows = list(build("stage", one)(rows, nobody()))
            own = Counter(row["source"] for row in rows)
            assert len(rows) == (later if len(own) > 1 else new)
            if len(own) > 1:
                *old, name = sorted(own)
                assert own[name] == pytest.approx(len(rows) / 2, abs=0.08 * len(rows))
                for one in old:
                    assert own[one] == pytest.approx(len(rows) / 2 / len(old), abs=0.08 * len(rows))


def test_what_cannot_be_is_refused():
    for wrong in ({"tasks": ["a", "a"]}, {"tasks": ["a", "b"], "replay": 0}, {"selector": {"data": "x"}}):
        with pytest.raises(RecipeError):
            build("plan", {"name": "conpet", **wrong})
    build("plan", {"name": "conpet", "tasks": ["a", "b"], "replay": 0, "dynamic": False})
    with pytest.raises(RecipeError, match="no held-out row has source 'd'"):
        played({"name": "conpet", "tasks": TASKS}, Recipe.load({}), reports(names=TASKS[:3]))
    with pytest.raises(RecipeError, match="modules start from the base"):
        played({"name": "conpet", "tasks": TASKS}, Recipe.load({"init_from": "x"}), reports())


CLASSES = ["xo", "mu", "ka", "ri", "te", "po", "sa", "lu", "ne", "gi"]


def stream(model, folder, tasks, steps, **settings):
    """A plan's report: every task has four inputs of two classes of its own."""
    rows = [
        {"prompt": f"{task}{k}:", "completion": CLASSES[2 * task + k % 2], "source": str(task)}
        for task in range(tasks)
        for k in range(4)
    ]
    recipe = {"data": rows, "eval_data": rows, "max_steps": steps, "learning_rate": 1e-2}
    recipe |= {"per_device_train_batch_size": 8, "save_steps": steps, "tuner": {"name": "lora", "r": 4}}
    plan = {"name": "conpet", "tasks": [str(task) for task in range(tasks)], **settings}
    return luthier.tune(recipe_of(model) | recipe | {"plan": plan}, folder=folder)


def tensors(run):
    return checkpoints.load(checkpoints.paths(Path(run))[-1]).tensors


@pytest.mark.long
def test_later_tasks_do_not_touch_a_module(shallow, tmp_path):
    short, long = (stream(shallow, tmp_path / str(n), n, 2, replay=4, rows=8) for n in (2, 3))
    assert len(short.runs) == 3 and len(long.runs) == 5
    for before, after in zip(short.runs, long.runs, strict=False):
        one, other = tensors(before), tensors(after)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_dynamic_is_above_static_above_sequential(shallow, tmp_path):
    ways = {
        "dynamic": {"replay": 8, "top_k": 1},
        "static": {"replay": 8, "dynamic": False},
        "sequential": {"replay": 0, "dynamic": False},
    }
    numbers = {}
    for name, settings in ways.items():
        done = stream(shallow, tmp_path / name, 5, 40, rows=64, **settings)
        numbers[name] = done.stats["continual"]["average_accuracy"]
    assert numbers["dynamic"] > numbers["static"] + 0.05, numbers
    assert numbers["static"] > numbers["sequential"] + 0.1, numbers
