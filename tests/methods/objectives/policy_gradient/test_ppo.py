"""ppo: its loss by hand, a warm-up of the critic, and both kinds of critic."""

from __future__ import annotations

import json

import pytest
import torch

import luthier
from helpers.objectives import batch_of, cast, contract_rows, gradients
from luthier.methods.architectures.text.reward_model import RewardModel
from luthier.methods.roles.networks.value_model import Critic
from luthier.registry import build

CRITICS = {"head": "value_head", "network": {"name": "value_model", "model": "toy:lm-small"}}
COLUMNS = ("token_advantages", "returns", "old_values", "old_logprobs")


def flat(rows: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([x for row in rows for part in row[name] for x in part])


def test_the_loss_by_hand():
    objective, roles = build("objective", {"name": "ppo", "vf_coef": 0.3, "cliprange_value": 0.1}), cast()
    rows = contract_rows(objective)
    batch = batch_of(rows)
    advantage, returns, old_values, old = (flat(rows, name) for name in COLUMNS)
    ratio = (roles.policy.logprobs(batch) - old).exp()
    values = roles.critic.values(roles.policy, batch)
    near = old_values + (values - old_values).clamp(-0.1, 0.1)
    critic = torch.max((values - returns).square(), (near - returns).square()) / 2
    want = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.3 * critic
    torch.testing.assert_close(objective.loss(roles, batch_of(rows)), want)


def test_in_the_warm_up_only_the_critic_learns():
    roles = cast()
    rows = contract_rows(build("objective", "ppo"))
    for warmup, moves in ((1, False), (0, True)):
        roles.policy.zero_grad()
        roles.critic.zero_grad()
        build("objective", {"name": "ppo", "critic_warmup": warmup}).loss(
            roles, batch_of(rows)
        ).sum().backward()
        assert any(bool(g.any()) for g in gradients(roles.policy.model).values()) == moves
        assert bool(roles.critic.value.weight.grad.any())
    roles.clock.step = 1
    late = build("objective", {"name": "ppo", "critic_warmup": 1}).loss(roles, batch_of(rows))
    torch.testing.assert_close(late, build("objective", "ppo").loss(roles, batch_of(rows)))


def test_a_head_that_shares_the_policys_states():
    roles, rows = cast(), contract_rows(build("objective", "ppo"))
    for detach in (True, False):
        roles.policy.zero_grad()
        roles.critic.detach = detach
        roles.critic.values(roles.policy, batch_of(rows)).sum().backward()
        assert any(bool(g.any()) for g in gradients(roles.policy.model).values()) != detach


def test_a_network_of_its_own_says_what_its_forward_says(tiny):
    torch.manual_seed(0)
    net = RewardModel().load(tiny, dtype=torch.float32).eval()
    critic, rows = Critic(net), contract_rows(build("objective", "ppo"))
    with torch.no_grad():
        values = critic.values(None, batch_of(rows))
        want = []
        for row in rows:
            marks = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
            for completion, mask in zip(row["completions"], marks, strict=True):
                ids = torch.tensor([row["prompt"] + completion])
                states = net.model(ids).last_hidden_state
                each = net.score(states)[0, len(row["prompt"]) - 1 : -1, 0]
                want.append(each[torch.tensor(mask)])
    torch.testing.assert_close(values, torch.cat(want), atol=1e-4, rtol=1e-4)
    assert critic.all_param_groups()[0].params.keys() == dict(critic.named_parameters()).keys()


@pytest.mark.long
@pytest.mark.parametrize("critic", ["head", pytest.param("network", marks=pytest.mark.slow)])
def test_a_run_learns_its_critic_and_is_resumed_alike(tmp_path, critic):
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": "toy:arithmetic/train", "n": 16},
        "objective": "ppo",
        "roles": {"critic": CRITICS[critic]},
        "num_iterations": 2,
        "online_stages": [
            {"name": "rollout", "n": 1, "max_new_tokens": 6, "old": True},
            {"name": "score", "reward": {"name": "length", "of": "characters"}},
            {"name": "advantages", "baseline": "critic"},
        ],
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "evaluate": [],
        "eval_data": 0,
    }
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    luthier.tune(recipe, folder=tmp_path / "parts", stop_at=2)
    again = luthier.tune(recipe, folder=tmp_path / "parts")
    assert again.losses == whole.losses
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "value_loss" in line]
    assert steps and all("explained_variance" in line and "entropy" in line for line in steps)
    assert steps[-1]["value_loss"] < steps[0]["value_loss"]
