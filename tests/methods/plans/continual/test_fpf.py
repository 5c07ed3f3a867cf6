"""fpf: which tensors are chosen, when repairs come, what moves in them, and what they mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rows import recipe_of
from luthier.methods.plans.continual.fpf import sensitive, sensitivities
from luthier.recipe.recipe import Recipe
from luthier.storage import checkpoints

TASKS = ["a", "b", "c", "d"]


def test_the_tensors_that_went_far_are_chosen_within_the_budget():
    before = {
        "still": torch.ones(10),
        "far": torch.full((4,), 2.0),
        "some": torch.ones(6),
        "gone": torch.ones(1),
    }
    after = {"still": torch.ones(10), "far": torch.full((4,), 5.0), "some": torch.full((6,), 1.5)}
    assert sensitivities([(before, after)]) == pytest.approx({"still": 0.0, "far": 3.0, "some": 0.5})
    twice = sensitivities([(before, after), (after, after)])
    assert twice == pytest.approx({"still": 0.0, "far": 1.5, "some": 0.25})
    assert sensitive([(before, after)], 0.2) == {"far"}
    assert sensitive([(before, after)], 0.5) == {"far", "some"}
    assert sensitive([(before, after)], 0.01) == {"far"}, "at least one"
    assert sensitive([(before, after)], 1.0) == set(after)


def test_rounds_lie_evenly_and_none_is_the_plain_stream():
    reports = []
    for k in range(8):
        reports.append(report(f"run-{k}", **{f"source_accuracy/{name}": 0.5 for name in TASKS}))
        reports[-1].before = dict(reports[-1].after)

    def requests(**plan):
        return played({"tasks": TASKS, **plan}, Recipe.load({}), reports)[0]

    plain = requests(name="continual")
    none = requests(name="fpf", rounds=0)
    assert [one.fingerprint() for one in none] == [one.fingerprint() for one in plain]
    assert [one.init_from for one in none] == [one.init_from for one in plain]
    for rounds, behind in ((1, [4]), (2, [2, 5]), (4, [2, 4, 6])):
        every = requests(name="fpf", rounds=rounds, memory=9, steps=7)
        repairs = [k for k, one in enumerate(every) if one.max_steps == 7]
        assert repairs == behind and len(every) == 4 + len(behind)
        assert [one.init_from for one in every] == [None, *(f"run-{k}" for k in range(len(every) - 1))]
        assert every[-1].stages[0]["counts"] == {"a": 3, "b": 2, "c": 2, "d": 2}


ANSWERS = ["xo", "mu", "ka", "ri"]


def stream(model, folder, tasks, task_steps, **plan):
    rows = [
        {"prompt": f"{task}{k}:", "completion": ANSWERS[(k + task) % 4], "source": str(task)}
        for task in range(tasks)
        for k in range(4)
    ]
    recipe = {"data": rows, "eval_data": rows, "max_steps": task_steps, "learning_rate": 1e-2}
    recipe |= {"per_device_train_batch_size": 16, "save_steps": task_steps}
    plan = {"name": "fpf", "tasks": [str(task) for task in range(tasks)], **plan}
    return luthier.tune(recipe_of(model) | recipe | {"plan": plan}, folder=folder)


@pytest.mark.long
def test_in_a_repair_the_chosen_tensors_alone_move(shallow, tmp_path):
    done = stream(shallow, tmp_path, 2, 2, rounds=1, steps=2, memory=8, share=0.1)
    ends = [checkpoints.load(checkpoints.paths(Path(run))[-1]).tensors for run in done.runs]
    assert len(ends) == 3
    chosen = sensitive([(ends[0], ends[1])], 0.1)
    moved = {name for name, tensor in ends[2].items() if not torch.equal(tensor, ends[1][name])}
    assert moved == chosen and 0 < len(chosen) < len(ends[0])


@pytest.mark.slow
def test_it_repairs_what_a_stream_forgot(shallow, tmp_path):
    ends = {}
    for rounds in (0, 1):
        done = stream(shallow, tmp_path / str(rounds), 4, 24, rounds=rounds, steps=60, memory=16, share=0.3)
        ends[rounds] = done.stats["continual"]["average_accuracy"]
    assert ends[1] > ends[0] + 0.2
