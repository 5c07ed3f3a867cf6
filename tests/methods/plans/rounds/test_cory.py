"""cory: who plays what, whose answer is read by whom, and what both earn."""

from __future__ import annotations

import pytest

from helpers.decoding import By
from helpers.plans import played, report
from helpers.rounds import scripted
from luthier.methods.stages.rollout.cooperative_rollout import CooperativeRollout
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.score import Score
from luthier.recipe.recipe import Recipe

ROWS = [{"id": "a", "prompt": "sum?"}, {"id": "b", "prompt": "difference?"}]
LENGTH = By(lambda text: len(text))


@pytest.fixture
def recipe(shallow):
    return Recipe.load({"model": shallow, "tuner": "lora"})


def cast():
    """A policy that writes `own` and a digit of its seed, a partner that writes how much it read."""
    roles = scripted(lambda prompt, seed: "own" + "x" * (seed % 3))
    partner = scripted(lambda prompt, seed: f"read {len(prompt)}").policy
    roles.partner = partner
    return roles


def text(ids) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize("turn", ["pioneer", "observer"])
def test_both_earn_the_sum(turn):
    roles = cast()
    stage = CooperativeRollout(turn=turn, n=2, reward=(LENGTH,), template="{prompt}|{answer}")
    for row in stage(ROWS, roles):
        own = [text(answer) for answer in row["completions"]]
        theirs = row["partner_answers"]
        assert row["scores"] == [len(a) + len(b) for a, b in zip(own, theirs, strict=True)]
        question = next(one["prompt"] for one in ROWS if one["id"] == row["id"])
        if turn == "pioneer":
            assert row["prompt"] == question
            assert theirs == [f"read {len(question) + 1 + len(answer)}" for answer in own]
        else:
            assert row["prompt"] == f"{question}|read {len(question)}" and theirs[0] == theirs[1]


def test_without_the_partner_it_is_a_plain_rollout():
    """The same samples, log-probabilities and scores, whatever the partner writes: its draws are its own."""
    stage = CooperativeRollout(n=3, reward=(LENGTH,), share=0.0)
    out = stage(ROWS, cast())
    plain = list(Score(reward=(LENGTH,))(Rollout(n=3, old=True)(ROWS, cast()), cast()))
    for row, other in zip(out, plain, strict=True):
        assert {name: row[name] for name in other} == other


def test_agents_swap_roles(recipe):
    reports = [[report(f"{round}-{agent}") for agent in (0, 1)] for round in range(3)]
    requests, last = played({"name": "cory", "rounds": 3, "swap_every": 7}, recipe, reports)
    turns = [[run.online_stages[0]["turn"] for run in pair] for pair in requests]
    assert turns == [["pioneer", "observer"], ["observer", "pioneer"], ["pioneer", "observer"]]
    partners = [[run.roles["partner"]["model"] for run in pair] for pair in requests]
    assert partners == [[recipe.model, recipe.model], ["0-1", "0-0"], ["1-1", "1-0"]]
    # the pioneer after a swap is the observer before it
    assert requests[1][1].init_from == "0-1" and requests[2][0].init_from == "1-0"
    assert all(run.max_steps == 7 for pair in requests for run in pair)
    draws = [run.online_stages[0]["draw"] for pair in requests for run in pair]
    assert len(set(draws)) == len(draws) and last.folder == "2-0"
