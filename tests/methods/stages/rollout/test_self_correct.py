"""self_correct: two turns with their own rewards, a bonus for what changed, and the gradient of both."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.stages import rollout, rows_with
from luthier.methods.stages._base import text_of
from luthier.methods.stages.rollout.self_correct import against_others, turn_returns
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded


def test_the_bonus_and_the_counts(roles):
    first, second = [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]
    plain, shaped = (turn_returns(first, second, 2, alpha, 1.0) for alpha in (0.0, 10.0))
    bonus = [b - a for a, b in zip(plain[1], shaped[1], strict=True)]
    assert bonus == [10.0, -10.0, 0.0, 0.0] and plain[0] == shaped[0] == [1.0, 1.0, 2.0, 0.0]
    assert turn_returns(first, second, 1, 10.0, 0.5) == ([0.5, 0.0, 0.5, 0.0], second)
    rows = rollout(n=3)(rows_with(set(), 4), roles)
    length = {"name": "length", "of": "characters"}
    stage = build("stage", {"name": "self_correct", "reward": length, "kl_coef": 0.0, "max_new_tokens": 8})
    seconds = [row["rewards"] for row in stage(rows, roles) if "rewards" in row]
    gained = sum(r["second"][0] > r["first"][0] for r in seconds) - sum(
        r["second"][0] < r["first"][0] for r in seconds
    )
    assert gained == sum(r["mended"][0] - r["spoilt"][0] for r in seconds)


def test_two_rows_for_two_turns(roles):
    rows = rollout(n=2)(rows_with(set(), 3), roles)
    length = {"name": "length", "of": "characters"}
    settings = {"name": "self_correct", "reward": length, "max_new_tokens": 8}
    stage = build("stage", {**settings, "kl_coef": 0.1})
    out = stage(rows, roles)
    assert len(out) == 12 and len({row["id"] for row in out}) == 12
    attempt = text_of(roles, rows[0]["completions"][0])
    assert out[0]["prompt"] == rows[0]["prompt"] and out[1]["prompt"].startswith(
        rows[0]["prompt"] + attempt + "\n"
    )
    sizes = [len(row["token_advantages"][0]) for row in out]
    assert sizes == [len(row["completions"][0]) for row in out]
    free = build("stage", {**settings, "kl_coef": 0.0})(rows, roles)
    for row, other in zip(out, free, strict=True):  # the reference is the policy: the KL is 0
        assert row["token_advantages"][0] == pytest.approx(other["token_advantages"][0], abs=1e-4)
    chat = build("stage", {**settings, "ask": "Again."}).prompt([{"role": "user", "content": "q"}], "a")
    assert chat[1:] == [{"role": "assistant", "content": "a"}, {"role": "user", "content": "Again."}]


class TwoTurns(nn.Module):
    """A table for the first answer and one for the second after each first."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, generator=rng, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 3, generator=rng, dtype=torch.float64))

    def logprobs(self, batch):
        one, two = batch.labels[batch.supervised].view(-1, 2).T
        logs = self.first.log_softmax(-1)[one], self.second.log_softmax(-1)[one, two]
        return torch.stack(logs, 1).flatten()


@pytest.mark.parametrize("phase, alpha", [(1, 0.0), (2, 0.0), (2, 10.0)])
def test_the_gradient_is_that_of_both_rewards(phase, alpha):
    """Over all pairs of episodes, each the other's baseline; the bonus is the second turn's alone."""
    policy, one, two = TwoTurns(), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    joint = (policy.first.log_softmax(-1)[:, None] + policy.second.log_softmax(-1)).exp()
    rows, likely = [], []
    for episodes in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
        first, second = ([float(r[e[k]]) for e in episodes] for k, r in enumerate((one, two)))
        earned = [against_others(values) for values in turn_returns(first, second, phase, alpha, 1.0)]
        advantages = [[earned[0][k], earned[1][k]] for k in range(2)]
        completions = [list(episode) for episode in episodes]
        rows.append({"id": "r", "prompt": [0], "completions": completions, "token_advantages": advantages})
        likely.append(joint.detach()[episodes[0]] * joint.detach()[episodes[1]])
    batch = collate(rows, lambda r: Encoded(r["prompt"], r["completions"], [[True] * 2] * 2))
    values = build("objective", "reinforce_pp").loss(SimpleNamespace(policy=policy), batch)
    ((torch.stack(likely)[batch.group[batch.owner]] * values).sum() / 2).backward()
    found = [p.grad.clone() for p in policy.parameters()]
    rewards = two.expand(3, 3) + (one[:, None] if phase == 2 else 0.0)
    shaped = rewards + alpha * (two - one[:, None])
    for place, (p, value) in enumerate(zip(policy.parameters(), (rewards, shaped), strict=True)):
        joint = (policy.first.log_softmax(-1)[:, None] + policy.second.log_softmax(-1)).exp()
        (want,) = torch.autograd.grad(-(joint * value).sum(), p)
        torch.testing.assert_close(found[place], want, atol=1e-6, rtol=1e-5)
