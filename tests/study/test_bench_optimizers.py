"""bench optimizers: the recipe that it plays, its table, refusals, and the command."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.study.bench.optimizers import OPTIMIZERS, WORKLOADS, recipe_of, table

LINES = [
    {"optimizer": "sgd", "score": 1.0, "default": 0.5, "one rate": 0.75, "steps: mine": 7.0},
    {"optimizer": "adamw", "score": 0.0, "default": 0.0, "one rate": 0.0, "steps: mine": None},
]
STATS = {"table": LINES, "targets": {"mine": 0.25}}


def test_the_recipe_is_whole_and_a_workload_of_ones_own_replaces_the_small_ones():
    small = recipe_of(None, None, None, 2, 1, 40)
    assert Recipe.load(small).methods()["tuner"].name == "lora"
    assert tuple(small["plan"]["optimizers"]) == OPTIMIZERS and small["plan"]["workloads"] == WORKLOADS
    own = recipe_of(["sgd", "adamw"], "folder", "rows.jsonl", 2, 3, 10)
    assert own["plan"]["workloads"] == {"rows.jsonl": {"data": "rows.jsonl"}} and own["model"] == "folder"
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        recipe_of(["adamv"], None, None, 2, 1, 40)


def test_the_table_says_who_never_arrives():
    first, best, worst, aims = table(STATS).splitlines()
    assert "mine" in first and best.startswith("sgd") and "7 steps" in best
    assert "never" in worst and aims == "losses to reach: mine 0.250"


def test_the_command_plays_the_plan(monkeypatch, tmp_path):
    recipes = []

    def tune(recipe, folder):
        recipes.append(recipe)
        return SimpleNamespace(stats=STATS)

    monkeypatch.setattr("luthier.run.run.tune", tune)
    words = ["bench", "optimizers", "--only", "sgd", "--only", "adamw", "--trials", "2", "--repeats", "3"]
    done = CliRunner().invoke(app, [*words, "--output-dir", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    plan = recipes[0]["plan"]
    assert (plan["optimizers"], plan["trials"], plan["studies"]) == (["sgd", "adamw"], 2, 3)
    assert json.loads((tmp_path / "optimizers.json").read_text()) == STATS
    assert CliRunner().invoke(app, ["bench", "optimizers", "sft"]).exit_code != 0
