"""episodes: a row for each turn, what it earned, and advantages that do not depend on its own action."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from luthier.methods.stages.rollout.episodes import Episodes, returns_to_go
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded

GROWTH = """
class Growth:
    \"\"\"A reward for every letter, two turns.\"\"\"
    def __init__(self, row, seed):
        self.turn = 0
    def reset(self):
        return "go"
    def step(self, action):
        self.turn += 1
        return "on", float(len(action)), self.turn == 2
"""


@pytest.fixture
def growth(tmp_path):
    (tmp_path / "growth.py").write_text(GROWTH)
    return {"name": "function", "path": f"{tmp_path}/growth.py:Growth"}


def test_a_row_for_each_turn_with_what_it_earned(roles, growth):
    settings = {"name": "episodes", "environment": growth, "n": 3, "max_turns": 5, "max_new_tokens": 4}
    stage = build("stage", {**settings, "gamma": 0.5})
    rows = [{"id": "a", "prompt": "say"}, {"id": "b", "prompt": [{"role": "user", "content": "say"}]}]
    out = stage(rows[:1], roles)
    assert [row["id"] for row in out] == [f"a/{k}/{t}" for k in range(3) for t in range(2)]
    assert out == stage(rows[:1], roles), "the draws follow from seed, step and id"
    texts = [roles.text(row["completions"][0]) for row in out]
    lengths = [float(len(text)) for text in texts]
    for k in range(3):
        one, two = out[2 * k], out[2 * k + 1]
        assert one["prompt"] == "say\ngo\n" and two["prompt"] == f"say\ngo\n{texts[2 * k]}\non\n"
        assert one["scores"] == [lengths[2 * k] + 0.5 * lengths[2 * k + 1]]
        assert two["scores"] == [lengths[2 * k + 1]] and "rewards" not in one
        assert two["rewards"] == {"return": [lengths[2 * k] + lengths[2 * k + 1]], "turns": [2.0]}
    for place, row in enumerate(out):
        others = [other["scores"][0] for other in out[place % 2 :: 2] if other is not row]
        wanted = row["scores"][0] - sum(others) / 2
        assert row["token_advantages"] == [[pytest.approx(wanted)] * len(row["completions"][0])]


def test_returns_to_go():
    assert returns_to_go([1.0, 0.0, 4.0], 0.5) == [2.0, 2.0, 4.0]
    assert returns_to_go([], 1.0) == []


class TwoActions(nn.Module):
    """Logits of the first action, and of the second after each first."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.one = nn.Parameter(torch.randn(2, generator=rng, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(2, 2, generator=rng, dtype=torch.float64))

    def logprobs(self, batch):
        logs = []
        for row in batch.rows:
            first, (action,) = row["first"], row["completions"][0]
            logits = self.one if first is None else self.two[first]
            logs.append(logits.log_softmax(-1)[action])
        return torch.stack(logs)


def test_the_gradient_is_that_of_the_expected_return():
    """Over all pairs of episodes, weighted by how likely they are, each the other's baseline."""
    reward = torch.tensor([[0.0, 3.0], [1.0, -1.0]], dtype=torch.float64)
    policy, stage = TwoActions(), build("stage", {"name": "episodes", "environment": "site", "n": 2})
    assert isinstance(stage, Episodes)
    joint = policy.one.softmax(-1)[:, None] * policy.two.softmax(-1)
    total: Any = 0.0
    for pair in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
        earned = [[0.5 + float(reward[a, b]), float(reward[a, b])] for a, b in pair]
        likely = torch.stack([joint.detach()[a, b] for a, b in pair]).prod()
        for place, (a, b) in enumerate(pair):
            turns = []
            for first, action in ((None, a), (a, b)):
                row = {"id": "r", "prompt": [0], "completions": [[action]], "first": first}
                turns.append(SimpleNamespace(row=row))
            rewards = [0.5, float(reward[a, b])]
            episode: Any = SimpleNamespace(turns=turns, total=sum(rewards))
            rows = stage.turns(episode, earned, place)
            batch = collate(rows, lambda r: Encoded(r["prompt"], r["completions"], [[True]]))
            values = build("objective", "reinforce_pp").loss(SimpleNamespace(policy=policy), batch)
            total = total + likely * values.sum() / 2
    total.backward()
    wanted = torch.autograd.grad(-(joint * (0.5 + reward)).sum(), [policy.one, policy.two])
    for parameter, gradient in zip(policy.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_policy_learns_by_acting(four_layers, tmp_path, growth):
    """The return rises under online episodes, and the evaluator writes the episodes down."""
    import luthier

    recipe = {
        "model": four_layers,
        "tuner": "full",
        "data": [{"prompt": f"say {k}", "completion": "x"} for k in range(8)],
        "eval_data": [{"prompt": "say it", "completion": "x"}],
        "objective": "reinforce_pp",
        "online_stages": [{"name": "episodes", "environment": growth, "n": 4, "max_new_tokens": 4}],
        "evaluate": [{"name": "success", "environment": growth, "max_new_tokens": 4, "threshold": 1e9}],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
    }
    report = luthier.tune(recipe, folder=tmp_path / "run")
    (line,) = map(json.loads, (tmp_path / "run/episodes-after.jsonl").read_text().splitlines())
    assert line["return"] == report.after["episode_return"] == sum(len(t["action"]) for t in line["turns"])
    assert report.after["success"] == 0.0 and report.after["episode_turns"] == 2.0
