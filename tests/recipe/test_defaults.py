"""What a recipe that says nothing gets: a learning rate of its methods, epochs for its rows."""

from __future__ import annotations

import pytest

from luthier import registry
from luthier.recipe import catalogue
from luthier.recipe.defaults import default_epochs
from luthier.recipe.recipe import DEFAULTS, Recipe
from luthier.recipe.validate import dry_run
from luthier.run.prepare import RunLength, describe_length


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({}, "tuner lora 0.0002"),
        ({"tuner": "dora", "objective": "0.1*dpo + sft"}, "tuner lora 0.0002"),
        ({"tuner": {"name": "ssf"}, "optim": ["clip", "lion"]}, "tuner ssf 0.001 x transform lion 0.2"),
        (
            {"objective": [{"name": "dpo"}, {"name": "sft", "weight": 0.1}]},
            "tuner lora 0.0002 x objective dpo",
        ),
    ],
)
def test_the_rate_is_that_of_the_methods(recipe, reason):
    made = Recipe.load(recipe)
    assert made.default_rate().reason.startswith(reason) and made.learning_rate == made.default_rate().value
    assert made.origins["learning_rate"] == "default"


def test_a_rate_that_is_written_stays():
    made = Recipe.load({"learning_rate": 0.5, "objective": "dpo"})
    assert made.but(tuner="full").learning_rate == 0.5
    open_rate = Recipe.load({"objective": "dpo"})
    other = open_rate.but(tuner="full")
    assert other.learning_rate == Recipe.load({"objective": "dpo", "tuner": "full"}).learning_rate
    assert other.learning_rate < open_rate.learning_rate and other.origins["learning_rate"] == "default"
    assert Recipe.load(open_rate, {"objective": "sft"}).learning_rate == DEFAULTS["learning_rate"]


def test_explain_says_why():
    values = {value.key: value for value in catalogue.explain({"objective": "dpo"})[0]}
    assert values["learning_rate"].origin.startswith("default: tuner lora 0.0002 x objective dpo")
    assert values["num_train_epochs"].value == "auto" and values["seed"].origin == "default"


def test_every_tuner_declares_a_rate():
    assert not [card.name for card in registry.cards("tuner", own=True) if not card.default_rate]
    assert registry.find("tuner", "lora").default_rate == registry.card("tuner", "lora").default_rate
    assert "Default learning rate" in registry.page(registry.find("objective", "dpo"))


def test_few_rows_are_read_several_times():
    assert [default_epochs(rows) for rows in (1, 57, 600, 1000, 3000, 60_000)] == [10, 10, 5, 3, 1, 1]
    text = describe_length(Recipe.load({}), RunLength(8, 570, 72, 10), 57)
    assert text == (
        "72 steps of 8 rows (10 epochs of 57 rows, the default for so many), learning rate 0.0002 (default:"
        " tuner lora 0.0002)"
    )
    written = Recipe.load({"learning_rate": 1e-3, "max_steps": 5})
    assert describe_length(written, RunLength(8, None, 5), 57) == "5 steps of 8 rows, learning rate 0.001"


PAIR = {"id": "0", "prompt": "2+2=", "completions": [" 4", " 5"], "scores": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("recipe", "measured", "role"),
    [
        ({"objective": "dpo"}, True, "base"),
        ({"objective": "dpo", "tuner": "full"}, True, "initial"),
        # without a reference of its own: the base, which takes no memory, but no second network
        ({"objective": "orpo"}, True, "base"),
        ({"objective": "orpo", "tuner": "full"}, False, None),
        ({"objective": "sft"}, False, None),
        ({"objective": "orpo", "evaluate": ["loss"]}, False, None),
    ],
)
def test_of_pairs_the_ranking_is_measured(recipe, measured, role):
    """Loss and answers say nothing of what preference tuning is for: held-out pairs in the right order."""
    methods = dry_run(Recipe.load({"model": "toy:lm-small", **recipe}), [PAIR])
    assert ("preference" in [evaluator.name for evaluator in methods.evaluate]) is measured
    assert getattr(methods.roles.get("reference"), "name", None) == role
