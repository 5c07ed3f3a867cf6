"""mcts_pairs, mcts_dpo: the search orders steps as enumeration does, and its counts smooth the loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.rounds import scripted
from luthier.methods.stages.rollout._tree import Node
from luthier.registry import build
from luthier.toy import bandit

STEPS = ("a", "b")
RIGHT = {"name": "regex", "pattern": r"^a;(a;a|b;b)"}
SEARCH = {"name": "mcts_pairs", "reward": RIGHT, "separator": ";", "iterations": 64, "confidence": 0.0}


def value(text: str) -> float:
    """The mean outcome over all continuations."""
    steps = text.count(";")
    if steps == 3:
        return 1.0 if text in ("a;a;a;", "a;b;b;") else -1.0
    return sum(value(f"{text}{step};") for step in STEPS) / 2


def roles():
    return scripted(lambda prompt, seed: f"{STEPS[seed % 2]};rest;", lambda character: -0.5)


@pytest.fixture(scope="module")
def tree():
    stage, rows = build("stage", SEARCH), [{"id": "r", "prompt": "go:"}]
    (root,) = stage.search(rows, roles())
    return stage, rows[0], root


def test_visits_and_values_order_steps_as_enumeration_does(tree):
    _, _, root = tree
    first = {child.step: child for child in root.children}
    assert first["a;"].visits > 3 * first["b;"].visits
    for parent in (root, first["a;"], *first["a;"].children):
        by_step = {child.step: child for child in parent.children}
        if value(parent.text + "a;") != value(parent.text + "b;"):
            better = max(STEPS, key=lambda step: value(f"{parent.text}{step};"))
            worse = "b" if better == "a" else "a"
            assert by_step[f"{better};"].total > by_step[f"{worse};"].total
            assert by_step[f"{better};"].visits > by_step[f"{worse};"].visits
    assert root.visits == 64 == sum(child.visits for child in root.children)


def test_pairs_share_their_beginning(tree):
    stage, row, root = tree
    pairs = stage.pairs(row, root)
    assert [pair["prefix"].count(";") for pair in pairs] == sorted({p["prefix"].count(";") for p in pairs})
    for pair in pairs:
        chosen, rejected = ("".join(map(chr, ids)) for ids in pair["completions"])
        assert chosen != rejected and pair["scores"][0] > pair["scores"][1]
        assert value(pair["prefix"] + chosen) >= value(pair["prefix"] + rejected)
        assert pair["visits"][0] >= pair["visits"][1] >= 1
    again = build("stage", SEARCH)([row], roles())
    assert again == pairs  # a search that is done again is the same


def test_a_step_is_worth_what_it_adds():
    stage = build("stage", {**SEARCH, "gamma": 0.5})
    root = Node()
    one = Node([1], "x", root, value=0.4)
    two, three = Node([1], "y", one, value=1.0), Node([1], "z", one, value=-1.0)
    root.children, one.children = [one], [two, three]
    for leaf in (two, two, three):
        stage.visit([root, one, leaf])
    assert (two.total, three.total) == pytest.approx((0.6, -1.4))
    assert one.total == pytest.approx(0.4 + 0.5 * (2 * 0.6 - 1.4) / 3)
    one.logprob, root.visits = -2.0, 9
    assert stage.priority(root, one) == pytest.approx(one.total + math.exp(-2.0) * 3 / (1 + 3))
    sure = build("stage", {**SEARCH, "confidence": 1.0}).confidences(roles(), [({"prompt": "q"}, one)])
    assert sure == pytest.approx([1 / (1 + math.exp(0.5))])  # yes is a character longer


def test_the_loss_is_dpo_smoothed_by_visits():
    base = torch.tensor([0.3, -0.2, 0.1])
    policy = bandit.Arms(base)
    with torch.no_grad():
        policy.weights += torch.tensor([0.5, -0.5, 0.0])
    rows = bandit.pulled([[0, 1], [1, 2]], torch.tensor([2.0, 1.0, 0.0]))
    losses = {}
    for visits in ([4, 0], [3, 1], [2, 2], [1, 3]):
        batch = bandit.batch_of([{**row, "visits": visits} for row in rows])
        made = build("objective", {"name": "mcts_dpo", "beta": 0.7})
        losses[tuple(visits)] = made.loss(bandit.roles_of(policy), batch)
        smoothed = {"name": "dpo", "beta": 0.7, "label_smoothing": min(1 - visits[0] / 4, 0.5)}
        plain = build("objective", smoothed).loss(bandit.roles_of(policy), batch)
        torch.testing.assert_close(losses[tuple(visits)], plain)
    margin = 0.7 * torch.tensor([1.0, -0.5])
    torch.testing.assert_close(losses[4, 0], -F.logsigmoid(margin))
    still = bandit.Arms(base)
    batch = bandit.batch_of([{**row, "visits": [2, 2]} for row in rows])
    made.loss(bandit.roles_of(still), batch).sum().backward()
    assert still.weights.grad.abs().max() < 1e-7
