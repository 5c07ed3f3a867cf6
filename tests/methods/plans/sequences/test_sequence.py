"""One run after another: folders of earlier runs in later ones."""

from __future__ import annotations

import pytest

from helpers.plans import played, report
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe


def test_a_run_names_the_folder_of_an_earlier_one():
    score = {"name": "score", "reward": {"name": "reward_model", "model": "run:1"}}
    runs = [{}, {"init_from": None}, {"init_from": "run:0", "online_stages": [{"name": "rollout"}, score]}]
    plan = {"name": "sequence", "runs": runs}
    recipes, _ = played(plan, Recipe.load({}), [report("first"), report("second"), report("third")])
    last = recipes[2]
    assert last.init_from == "first"
    assert last.online_stages[1]["reward"]["model"] == "second"


def test_a_run_that_is_not_yet_there_is_refused():
    plan = {"name": "sequence", "runs": [{"init_from": "run:0"}]}
    with pytest.raises(RecipeError, match="'run:0' in run 0 of the plan: only runs before it"):
        played(plan, Recipe.load({}), [])
