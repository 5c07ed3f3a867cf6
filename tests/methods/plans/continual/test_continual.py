"""continual: the matrix and its numbers by hand, which rows a run reads, a small stream, a stop in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import luthier
from helpers.plans import played, report
from helpers.rows import recipe_of
from helpers.synthesis import nobody
from luthier.errors import RecipeError
from luthier.methods.evaluators._base import Change, keep, paired_change
from luthier.methods.plans.continual._transfer import (
    average_accuracy,
    backward_pairs,
    change_of_rows,
    forgetting,
    forward_pairs,
    interval,
    transfer,
)
from luthier.recipe.recipe import Recipe
from luthier.registry import build

TASKS = ["a", "b", "c"]
MATRIX = [[0.1, 0.2, 0.3], [0.9, 0.4, 0.2], [0.5, 0.8, 0.6], [0.7, 0.4, 1.0]]


def reports(matrix=MATRIX, names=TASKS):
    made = []
    for k, line in enumerate(matrix[1:]):
        one = report(f"run-{k}", **{f"source_accuracy/{n}": v for n, v in zip(names, line, strict=True)})
        before = zip(names, matrix[k], strict=True)
        one.before = {f"source_accuracy/{n}": v for n, v in before}
        made.append(one)
    return made


def test_the_numbers_of_a_matrix_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.7 + 0.4 + 1.0) / 3)
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert transfer(MATRIX, backward_pairs(3)) == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert transfer(MATRIX, forward_pairs(3)) == pytest.approx(((0.4 - 0.2) + (0.6 - 0.3)) / 2)
    assert forgetting(MATRIX[:2]) == 0.0 and transfer(MATRIX, []) == 0.0
    _, last = played({"name": "continual", "tasks": TASKS}, Recipe.load({}), reports())
    assert [[line[name] for name in TASKS] for line in last.stats["table"]] == MATRIX
    assert [line["after"] for line in last.stats["table"]] == ["before", *TASKS]
    assert last.stats["continual"] == pytest.approx(
        {
            "average_accuracy": 0.7,
            "forgetting": 0.3,
            "backward_transfer": -0.3,
            "forward_transfer": 0.25,
        }
    )


def test_intervals_are_those_of_the_rows(tmp_path):
    """Of one task that of its paired rows; of several narrower than of each, and symmetric ones add up in
    squares.
    """
    before = {str(k): float(k < 30) for k in range(40)}
    after = {str(k): float(k < 10) for k in range(40)}
    keep(tmp_path, "before", **{"source_accuracy/a": before})
    keep(tmp_path, "after", **{"source_accuracy/a": after})
    places = ((str(tmp_path), "before"), (str(tmp_path), "after"))
    change = change_of_rows("source_accuracy/a", *places)
    assert change == paired_change(before, after)
    assert interval([change]) == pytest.approx((change.low, change.high))
    assert change_of_rows("source_accuracy/b", *places) is None
    assert change_of_rows("source_accuracy/a", places[0], ("nowhere", "after")) is None
    symmetric = [Change(0.5, 0.6, 0.1, 0.1 - half, 0.1 + half) for half in (0.03, 0.04)]
    assert interval(symmetric) == pytest.approx((0.1 - 0.025, 0.1 + 0.025))


def test_runs_read_their_task_and_the_memory_of_earlier_ones():
    rows = [{"id": f"{name}{k}", "prompt": "", "source": name} for name in TASKS for k in range(20)]

    def ids(**settings):
        requests, _ = played({"name": "continual", "tasks": TASKS, **settings}, Recipe.load({}), reports())
        assert [one.init_from for one in requests] == [None, "run-0", "run-1"]
        return [{row["id"] for row in build("stage", one.stages[0])(rows, nobody())} for one in requests]

    of_task = [{row["id"] for row in rows if row["source"] == name} for name in TASKS]
    assert ids() == of_task
    assert ids(cumulative=True) == [of_task[0], of_task[0] | of_task[1], set().union(*of_task)]
    first, second, third = ids(replay=5)
    assert first == of_task[0]
    assert of_task[1] < second and len(second & of_task[0]) == 5
    assert of_task[2] < third and [len(third & each) for each in of_task] == [3, 2, 20]
    assert third & of_task[0] < second & of_task[0]  # a smaller memory is part of the larger one


def test_later_runs_may_differ_and_wrong_streams_are_refused():
    later = {"objective": "sft + 0.5*kl", "roles": {"reference": "initial"}}
    requests, _ = played({"name": "continual", "tasks": TASKS, "later": later}, Recipe.load({}), reports())
    assert [one.objective for one in requests] == ["sft", "sft + 0.5*kl", "sft + 0.5*kl"]
    with pytest.raises(RecipeError, match="init_from belongs to the stream"):
        played({"name": "continual", "tasks": TASKS, "later": {"start": None}}, Recipe.load({}), reports())
    with pytest.raises(RecipeError, match="no held-out row has source 'c'"):
        played({"name": "continual", "tasks": TASKS}, Recipe.load({}), reports(names=["a", "b", "x"]))
    for wrong in ({"tasks": ["a", "a"]}, {"tasks": ["a"], "cumulative": True, "replay": 1}):
        with pytest.raises(RecipeError):
            build("plan", {"name": "continual", **wrong})


ANSWERS = ["xo", "mu", "ka", "ri"]


def stream(model, folder, tasks, steps, **settings):
    """A plan's report: every task has four rows, whose answers are those of the others in another order."""
    rows = [
        {"prompt": f"{task}{k}:", "completion": ANSWERS[(k + task) % 4], "source": str(task)}
        for task in range(tasks)
        for k in range(4)
    ]
    plan = {"name": "continual", "tasks": [str(task) for task in range(tasks)], **settings}
    recipe = {"data": rows, "eval_data": rows, "max_steps": steps, "learning_rate": 1e-2, "plan": plan}
    recipe |= {"per_device_train_batch_size": 16, "save_steps": steps}
    return luthier.tune(recipe_of(model) | recipe, folder=folder)


@pytest.mark.long
def test_a_stream_that_was_stopped_goes_on_to_the_same_matrix(shallow, tmp_path):
    whole = stream(shallow, tmp_path, 2, 2)
    for line, run in zip(whole.stats["table"][1:], whole.runs, strict=True):
        after = json.loads((Path(run) / "report.json").read_text())["after"]
        assert [line[name] for name in "01"] == [after[f"source_accuracy/{name}"] for name in "01"]
    assert "backward_low" in whole.stats["continual"]  # per row, so there is an interval
    shutil.rmtree(whole.runs[1])
    (tmp_path / "report.json").unlink()
    again = stream(shallow, tmp_path, 2, 2)
    assert again.stats["table"] == whole.stats["table"] and again.losses == whole.losses
    assert again.stats["continual"] == whole.stats["continual"]


@pytest.mark.slow
def test_a_stream_of_four_tasks(shallow, tmp_path):
    """Rehearsal forgets less than one task after the other; all rows so far end highest."""
    ways = {"naive": {}, "replay": {"replay": 6}, "every": {"cumulative": True}}
    numbers = {}
    for name, settings in ways.items():
        numbers[name] = stream(shallow, tmp_path / name, 4, 24, **settings).stats["continual"]
    assert numbers["replay"]["forgetting"] < numbers["naive"]["forgetting"] - 0.1
    averages = [numbers[name]["average_accuracy"] for name in ways]
    assert averages[0] < averages[1] < averages[2]
