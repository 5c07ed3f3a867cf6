"""task_diversity: equal rows for any number of tasks, unseen tasks are measured, a short second stage."""

from __future__ import annotations

from collections import Counter

import pytest

from helpers.plans import played, report
from helpers.synthesis import nobody
from luthier.errors import RecipeError
from luthier.registry import build

TASKS = [f"t{k}" for k in range(6)]
PLAN = {"name": "task_diversity", "tasks": TASKS, "held_out": ["u", "v"], "numbers": [2, 4, 16], "rows": 100}


def scored(u: float, v: float, folder: str = "x"):
    return report(folder, **{"source_accuracy/u": u, "source_accuracy/v": v})


def test_rows_are_equal_and_unseen_tasks_are_measured(recipe):
    requests, best = played(PLAN, recipe, [[scored(0.1, 0.3), scored(0.3, 0.5), scored(0.6, 0.6)]])
    rows = [{"id": f"{name}{k}", "prompt": "", "source": name} for name in [*TASKS, "u"] for k in range(60)]
    for number, one in zip((2, 4, 6), requests[0], strict=True):
        counts = Counter(row["source"] for row in build("stage", one.stages[0])(rows, nobody()))
        assert counts == one.stages[0]["counts"] and sum(counts.values()) == 100
        assert len(counts) == number and max(counts.values()) - min(counts.values()) <= 1
    assert [line["unseen"] for line in best.stats["table"]] == pytest.approx([0.2, 0.4, 0.6])


def test_a_short_second_stage_goes_on_from_the_best(recipe):
    plan = {**PLAN, "numbers": [2, 4], "chat": "style", "second": {"max_steps": 9}}
    first = [scored(0.1, 0.1, "few"), scored(0.4, 0.4, "many")]
    requests, best = played(plan, recipe, [first, scored(0.39, 0.41, "chat")])
    assert requests[1].init_from == "many" and requests[1].max_steps == 9
    assert requests[1].stages[0]["counts"] == {"style": 100} and best.folder == "chat"


def test_a_task_is_not_learned_and_held_out():
    with pytest.raises(RecipeError, match="both learned and held out"):
        build("plan", {**PLAN, "held_out": ["t0"]})
