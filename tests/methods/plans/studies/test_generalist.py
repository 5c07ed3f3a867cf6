"""generalist: the grid at equal exposure, what general rows add, general rows first."""

from __future__ import annotations

import pytest

from helpers.plans import played, report

PLAN = {"name": "generalist", "sizes": [100, 1000], "ratios": [0.0, 1.0]}


def scored(value: float, folder: str = "x"):
    return report(folder, **{"source_accuracy/specialist": value})


def test_the_grid_and_what_general_rows_add(recipe):
    values = [0.5, 0.6, 0.9, 0.905]
    requests, best = played(PLAN, recipe, [[scored(value) for value in values]])
    counts = [one.stages[0]["counts"] for one in requests[0]]
    assert counts == [
        {"specialist": 100, "general": 0},
        {"specialist": 100, "general": 100},
        {"specialist": 1000, "general": 0},
        {"specialist": 1000, "general": 1000},
    ]
    assert len({one.num_train_epochs for one in requests[0]}) == 1
    added = [line["added"] for line in best.stats["table"]]
    assert (
        added == pytest.approx([0.0, 0.1, 0.0, 0.005]) and best.after["source_accuracy/specialist"] == 0.905
    )


def test_general_rows_first(recipe):
    plan = {**PLAN, "sizes": [100], "order": "first"}
    requests, best = played(plan, recipe, [scored(0.5), scored(0.0, "general"), scored(0.7)])
    assert [one.init_from for one in requests] == [None, None, "general"]
    assert requests[1].stages[0]["counts"] == {"general": 100}
    assert requests[2].stages[0]["counts"] == requests[0].stages[0]["counts"] == {"specialist": 100}
    assert best.stats["table"][1]["added"] == pytest.approx(0.2)
