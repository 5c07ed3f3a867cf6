"""spin: asks for dpo against each rounds own start; begins each round at log two; learning to prefer what is
said anyway changes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import luthier
from helpers.objectives import fitted
from helpers.plans import played, report
from helpers.rows import SUMS
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage import files
from luthier.toy import bandit


def test_spin_asks_for_dpo_against_each_rounds_own_start(recipe):
    asked, _ = played(
        {"name": "spin", "rounds": 3, "beta": [0.1, 0.1, 5.0]}, recipe, [report(f"r{k}") for k in range(3)]
    )
    assert [r.init_from for r in asked] == [None, "r0", "r1"] and [
        r.stages[-1]["earlier"] for r in asked
    ] == [
        None,
        "r0",
        "r1",
    ]
    assert [r.objective["beta"] for r in asked] == [0.1, 0.1, 5.0] and all(
        r.roles["reference"] == "initial" for r in asked
    )
    with pytest.raises(RecipeError, match="beta: 1 values for 3 rounds"):
        build("plan", {"name": "spin", "beta": [0.1]})


@pytest.mark.long
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_spin_begins_each_round_at_log_two(base, tmp_path, tuner):
    plan = {"name": "spin", "rounds": 2, "max_new_tokens": 4}
    change = {"tuner": tuner, "plan": plan, "data": SUMS[:12], "max_steps": 6, "learning_rate": 5e-4}
    done = luthier.tune(base | change, folder=tmp_path)
    rounds = [luthier.Report.read(a) for a in done.runs]
    assert all(
        r.losses[0] == pytest.approx(math.log(2), abs=1e-5) and min(r.losses) < r.losses[0] - 1e-3
        for r in rounds
    )
    first, second = (files.read_rows(Path(r.folder) / "rows.jsonl") for r in rounds)
    assert len(first) == 12 and len(second) == 24
    assert [r["completions"] for r in second[12:]] == [r["completions"] for r in first]
    assert any(a["completions"] != b["completions"] for a, b in zip(first, second, strict=False))


def test_learning_to_prefer_what_is_said_anyway_changes_nothing(base, tmp_path):
    """Given and own answer are the same: the loss is log 2 and no weight moves."""
    from luthier.model.load import assemble
    from luthier.recipe.validate import validate

    made = Recipe.load({k: v for k, v in base.items() if k != "data"} | {"objective": "dpo"})
    roles = assemble(made, validate(made, load([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]).rows))
    roles.players["reference"] = roles.policy.as_role("reference")
    ids = roles.renderer.encode({"id": 0, "prompt": "1+1=", "completions": ["2"]}).completions[0]
    row = {"id": 0, "prompt": "1+1=", "completions": ["2", ids], "scores": [1.0, 0.0]}
    loss = build("objective", "dpo").loss(roles, roles.batch([row]))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in roles.tuner.parameters().values())


DATA = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])  # the distribution that answers are given by


def round_of_spin(log_policy, beta):
    """[arms] the policy after a round, at the minimum of its expected loss: a given answer against one's own
    from the policy that the round began with, which is its reference.
    """
    arms = range(len(DATA))
    pairs = [
        {"id": f"{a}-{b}", "prompt": [0], "completions": [[a], [b]], "scores": [1.0, 0.0]}
        for a in arms
        for b in arms
    ]
    weights = (DATA[:, None] * log_policy.exp()).flatten()
    aim = build("objective", {"name": "dpo", "beta": beta})
    return fitted(aim, bandit.roles_of(bandit.Arms(log_policy.clone())), pairs, 25 * weights)


def divergence(log_policy):
    return float((DATA * (DATA.log() - log_policy)).sum())


def test_rounds_approach_the_data_and_stay_there():
    """KL(data || policy) falls in each of three rounds: the gap of the log-probabilities is divided by beta
    each time. At the data's distribution nothing is left to learn.
    """
    policy = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.4]).log()
    gaps = [divergence(policy)]
    for _ in range(3):
        expected = (0.5 * policy + 0.5 * DATA.log()).log_softmax(-1)
        policy = round_of_spin(policy, beta=2.0)
        torch.testing.assert_close(policy, expected, atol=5e-3, rtol=0)
        gaps.append(divergence(policy))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 8 * gaps[3] > 0, gaps


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_at_the_data_the_gradient_is_zero_as_that_of_more_sft(name):
    """Further epochs of SFT are the control: both stand still at the data and move elsewhere."""
    sizes = []
    for start in (DATA.log(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.4]).log()):
        policy, arms = bandit.Arms(start), range(len(DATA))
        roles = bandit.roles_of(policy)
        if name == "dpo":
            rows = [
                {"id": f"{a}-{b}", "prompt": [0], "completions": [[a], [b]], "scores": [1.0, 0.0]}
                for a in arms
                for b in arms
            ]
            weights = (DATA[:, None] * start.exp()).flatten()
        else:
            rows = [{"id": str(a), "prompt": [0], "completions": [[a]]} for a in arms]
            weights = DATA
        loss = build("objective", name).loss(roles, bandit.batch_of(rows))
        (weights * loss).sum().backward()
        sizes.append(float(policy.weights.grad.norm()))
    assert sizes[0] < 1e-6 < 1e-2 < sizes[1]
