"""front: weights are spread evenly; goals enter by margins or by sums; a front is measured drawn and goes
on.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

import luthier
from helpers.plans import GOALS, SAMPLES
from luthier.errors import RecipeError
from luthier.methods.plans.studies.front import spread, weigh
from luthier.model import loaded as use
from luthier.registry import build
from luthier.study.statistics import hypervolume
from luthier.train.trainer import Trainer


def test_weights_are_spread_evenly():
    assert spread(2, 3) == [[0, 1], [0.5, 0.5], [1, 0]]
    three = spread(3, 7)
    assert three[:3] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] and all(sum(w) == pytest.approx(1) for w in three)
    assert (
        len({tuple(w) for w in three}) == 7
        and min(max(abs(a - b) for a, b in zip(three[3], t)) for t in three[:3]) > 0.3
    )


def test_goals_enter_by_margins_or_by_sums(recipe):
    pairs = {"short": {"name": "length", "scale": -1.0}, "right": "exact_match"}
    changed = weigh(recipe.but(objective={"name": "dpo", "beta": 0.2}), pairs, [0.75, 0.25])
    assert changed["objective"] == {"name": "modpo", "beta": 0.2, "weights": {"right": 0.25}}
    assert changed["stages"][-1]["name"] == "score_with" and changed["stages"][-1]["names"] == ["right"]
    rolled = weigh(recipe.but(**SAMPLES), GOALS, [0.75, 0.25])["online_stages"]
    assert (
        rolled[0]["name"] == "rollout"
        and rolled[1]["reward_weights"] == [0.75, 0.25]
        and rolled[1]["names"] == ["right", "short"]
    )
    with pytest.raises(RecipeError, match="its weight cannot be 0"):
        weigh(recipe.but(objective="dpo"), pairs, [0.0, 1.0])
    for wrong, said in (
        ({}, "needs goals"),
        ({"goals": {"one": "exact_match"}}, "at least two goals"),
        ({"goals": GOALS, "least": 0.49}, ""),
    ):
        plan = {"name": "front", **wrong}
        if said:
            with pytest.raises(RecipeError, match=said):
                next(build("plan", plan).recipes(recipe.but(objective="dpo")))
    with pytest.raises(RecipeError, match="weights goals by objective 'modpo'"):
        next(build("plan", {"name": "front", "goals": GOALS}).recipes(recipe))


@pytest.mark.slow
@pytest.mark.long
def test_a_front_is_measured_drawn_and_goes_on(tmp_path, monkeypatch):
    asked = {
        "model": "toy:lm-small",
        "data": {"path": "toy:style/short", "n": 32},
        "eval_data": {"path": "toy:style/short_test", "n": 8},
        "objective": "dpo",
        "learning_rate": 1e-3,
        "max_steps": 3,
        "tuner": "full",
        "plan": {
            "name": "front",
            "points": 3,
            "judged": 6,
            "max_new_tokens": 24,
            "goals": {
                "short": {"name": "task", "objective": "short"},
                "complete": {"name": "task", "objective": "complete"},
            },
        },
    }
    found = luthier.tune(asked, folder=tmp_path / "f")
    front = found.stats["front"]
    assert front["preferences"] == [
        pytest.approx([0.1, 0.9]),
        pytest.approx([0.5, 0.5]),
        pytest.approx([0.9, 0.1]),
    ]
    assert len({tuple(r) for r in front["reached"]}) > 1 and front["worst"] == [0, 0]
    assert front["hypervolume"] == pytest.approx(
        hypervolume([[-a for a in r] for r in front["reached"]], [0, 0])
    )
    page = (tmp_path / "f" / "report.html").read_text()
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    points = [json.loads(figure)["points"] for figure in figures if '"points"' in figure]
    assert "hypervolume" in page and len(points[0]) == 4 and 'src="http' not in page
    mixed = luthier.tune(
        asked | {"plan": asked["plan"] | {"between": "average"}}, folder=tmp_path / "m"
    ).stats["front"]
    ends = [use.load(front["folders"][i]).model.state_dict() for i in (0, -1)]
    first, middle, last = (use.load(folder).model.state_dict() for folder in mixed["folders"])
    assert all(torch.equal(first[n], ends[0][n]) and torch.equal(last[n], ends[1][n]) for n in first)
    assert all(
        torch.allclose(t.float(), (first[n].float() + last[n].float()) / 2, atol=1e-2)
        for n, t in middle.items()
    )
    assert any(not torch.equal(first[n], t) for n, t in middle.items())
    monkeypatch.setattr(Trainer, "run", lambda *a, **k: pytest.fail("all of this was known"))
    assert luthier.tune(asked, folder=tmp_path / "f").stats["front"] == front
