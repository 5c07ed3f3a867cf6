"""two_phase: both protocols on made-up streams, what is refused, and which settings are reported."""

from __future__ import annotations

import pytest

from helpers.plans import report
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage import files

PLAN = {
    "name": "two_phase",
    "tuning": ["a", "b"],
    "evaluation": ["c", "d"],
    "methods": {
        "brittle": [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}, {"learning_rate": 3e-3}],
        "steady": [{"stream": {"replay": 4}}, {"stream": {"replay": 4}, "learning_rate": 2e-3}],
    },
}


def accuracy(recipe) -> float:
    """What a run reaches: the brittle method has one good rate for each stream, the steady one does not
    mind.
    """
    counts = recipe.stages[0]["counts"]
    if any(0 < n < 100 for n in counts.values()):  # it replays
        return 0.7
    good = 2e-3 if {*counts} & {"a", "b"} else 1e-3
    return 0.9 if recipe.learning_rate == good else 0.3


def go(plan=PLAN, folders=None):
    """The plan's runs and its result, where runs measure `accuracy` on all tasks."""
    play, requests = build("plan", plan).recipes(Recipe.load({})), []
    request = next(play)
    try:
        while True:
            folder = folders[len(requests)] if folders else f"run-{len(requests)}"
            requests.append(request)
            score = {f"source_accuracy/{name}": accuracy(request) for name in "abcd"}
            one = report(str(folder), **score)
            one.before = dict(score)
            request = play.send(one)
    except StopIteration as end:
        return requests, end.value


def test_a_brittle_method_leads_in_sample_alone():
    requests, result = go()
    brittle, steady = result.stats["table"]
    assert (brittle["in sample"], steady["in sample"]) == (0.9, 0.7)
    assert (brittle["in-sample rank"], steady["in-sample rank"]) == (1, 2)
    assert (brittle["rank"], steady["rank"]) == (2, 1)
    assert brittle["setting"] == 1 and brittle["score"] == pytest.approx(0.3)
    assert any("'brittle' is best on the stream that it was tuned on" in note for note in result.notes)
    assert len(requests) == 2 * (3 + 2) + 2 * 2
    read = [{*one.stages[0]["counts"]} for one in requests]
    assert all(names <= {"a", "b"} for names in read[:10]) and all(names <= {"c", "d"} for names in read[10:])


def test_the_score_is_that_of_the_chosen_settings():
    """A stream with the setting that the result names scores the same; orders are drawn, each task once."""
    requests, result = go({**PLAN, "orders": 4, "evaluation": ["c", "d"]})
    setting = result.stats["settings"]["brittle"]
    assert setting == {"learning_rate": 2e-3}
    again, _ = go({**PLAN, "methods": {"brittle": [setting]}})
    chosen = requests[10:18]  # of four orders
    assert {one.learning_rate for one in chosen} == {2e-3}
    assert accuracy(again[-1]) == accuracy(chosen[-1]) == result.stats["table"][0]["score"]
    line = result.stats["table"][1]
    assert line["score"] == pytest.approx(0.7) and line["error"] == pytest.approx(0.0)
    method = build("plan", {**PLAN, "tuning": list("uvwx"), "evaluation": list("abcd"), "orders": 5})
    orders = method.task_orders(3)
    assert orders == method.task_orders(3) and orders[0] == list("abcd")
    assert all(sorted(order) == list("abcd") for order in orders) and len({*map(tuple, orders)}) > 1


def test_tasks_and_rows_of_both_streams_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="'b' is in both streams"):
        build("plan", {**PLAN, "evaluation": ["b", "c"]})
    with pytest.raises(RecipeError, match="same number of tasks"):
        build("plan", {**PLAN, "evaluation": ["c"]})
    plan = {**PLAN, "methods": {"steady": [{}]}}
    for shared in (False, True):
        folders = [tmp_path / f"{shared}-{k}" for k in range(4)]
        for k, folder in enumerate(folders):
            folder.mkdir()
            prompt = "p1" if shared and k == 3 else f"p{k}"
            files.write_rows(folder / "rows.jsonl", [{"id": str(k), "prompt": prompt, "completions": ["x"]}])
        if shared:
            with pytest.raises(RecipeError, match="1 rows of the tuning stream are in the other one"):
                go(plan, folders)
        else:
            assert go(plan, folders)[1].stats["table"][0]["rank"] == 1
