"""honeybee, topic_instructions: what a verifier lets through, and where the next rows go."""

from __future__ import annotations

import json
import re

import pytest

from helpers.plans import played, report
from helpers.synthesis import Scripted, nobody
from luthier.methods.plans.rounds.honeybee import budgets
from luthier.methods.stages.synthesize.topic_instructions import AXES
from luthier.recipe.recipe import Recipe
from luthier.registry import build

SEEDS = [{"id": "seed", "prompt": "What is steel?", "completions": ["An alloy."]}]


def write(prompt: str, seed: int) -> str:
    topic = re.search(r"about (\w+),", prompt)[1]
    return "Here: " + json.dumps({"instruction": f"Explain {topic} {seed}", "response": f"{seed % 4}"})


def verify(prompt: str, seed: int) -> str:
    """Responses 0 to 3 fail on the axis of that number; no axis is below 95 for none of them."""
    bad = int(prompt.rstrip()[-1])
    return json.dumps({axis: 40 if place == bad else 97 for place, axis in enumerate(AXES)})


def test_rows_below_the_threshold_on_any_axis_leave():
    settings = {"name": "topic_instructions", "counts": {"alloys": 8}, "writer": Scripted(write)}
    roles = nobody()
    assert list(build("stage", {**settings, "verifier": Scripted(verify)})(SEEDS, roles)) == SEEDS
    assert all(axis in roles.sentences[-1] for axis in AXES[:2])
    lenient = build("stage", {**settings, "verifier": Scripted(verify), "least": 40})(SEEDS, nobody())
    new = list(lenient)[1:]
    assert len(new) == 8 and len({row["id"] for row in new}) == 8
    assert all(row["source"] == "alloys" and len(row["provenance"]["ratings"]) == 4 for row in new)
    partly = Scripted(lambda prompt, seed: json.dumps({axis: 100 for axis in AXES[1:]}))
    assert list(build("stage", {**settings, "verifier": partly})(SEEDS, nobody())) == SEEDS


def test_budgets_follow_errors():
    errors = {"glass": 0.2, "alloys": 0.7, "polymers": 0.05, "oxides": 0.2}
    counts = budgets(errors, 23)
    assert sum(counts.values()) == 23 and max(counts, key=counts.__getitem__) == "alloys"
    order = sorted(errors, key=errors.__getitem__)
    assert [counts[topic] for topic in order] == sorted(counts.values())
    assert budgets({"a": 0.0, "b": 0.0}, 4) == {"a": 2, "b": 2}


@pytest.fixture
def recipe(shallow):
    return Recipe.load({"model": shallow, "tuner": "lora"})


def test_stages_go_on_and_weak_topics_get_more(recipe):
    after = {"source_accuracy/glass": 0.9, "source_accuracy/alloys": 0.4}
    reports = [report(f"run-{k}", **after) for k in range(3)]
    plan = {"name": "honeybee", "topics": ["glass", "alloys"], "budget": 14}
    requests, last = played(plan, recipe, reports)
    assert [run.init_from for run in requests] == [None, "run-0", "run-1"] and last.folder == "run-2"
    counts = [run.stages[-1]["counts"] for run in requests]
    assert counts == [{"glass": 7, "alloys": 7}, {"glass": 2, "alloys": 12}, {"glass": 2, "alloys": 12}]
    assert len({run.stages[-1]["draw"] for run in requests}) == 3
