"""Policy gradients on an enumerable policy: over all samples, the expected gradient is that of the expected
reward.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.clock import Clock
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded

K = 3  # tokens of the vocabulary; sequences have two of them
SEQUENCES = list(itertools.product(range(K), repeat=2))
REWARD = torch.tensor([0.3, 1.0, -0.5, 0.0, 0.7, 0.2, -1.0, 0.4, 0.9], dtype=torch.float64)


class Tree(nn.Module):
    """A table for the first token, and one for the second after each first. As a critic it is right."""

    def __init__(self, seed: int = 0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(K, generator=rng, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(K, K, generator=rng, dtype=torch.float64))

    def eval_mode(self):
        return nullcontext()

    def logprobs(self, batch):
        one, two = batch.labels[batch.supervised].view(-1, 2).T
        logs = self.first.log_softmax(-1)[one], self.second.log_softmax(-1)[one, two]
        return torch.stack(logs, 1).flatten()

    def log_policy(self) -> torch.Tensor:
        return (self.first.log_softmax(-1)[:, None] + self.second.log_softmax(-1)).flatten()

    def values(self, policy, batch):
        after = (REWARD.view(K, K) * self.second.softmax(-1)).sum(-1)
        tokens = batch.labels[batch.supervised].view(-1, 2)
        start = (after * self.first.softmax(-1)).sum().expand(len(tokens))
        return torch.stack([start, after[tokens[:, 0]]], 1).flatten().detach()


def batch_of(rows):
    return collate(
        rows, lambda r: Encoded(r["prompt"], r["completions"], [[True] * len(c) for c in r["completions"]])
    )


def roles_of(policy: Tree, reference: Tree | None = None):
    clock = Clock()
    return SimpleNamespace(policy=policy, reference=reference, critic=policy, batch=batch_of, clock=clock)


def every_draw(policy: Tree, n: int, **columns) -> tuple[list[dict], torch.Tensor]:
    """A row for each draw of n completions, and how likely it is."""
    rows, likely = [], []
    for chosen in itertools.product(range(len(SEQUENCES)), repeat=n):
        row = {
            "id": str(chosen),
            "prompt": [0],
            "completions": [list(SEQUENCES[i]) for i in chosen],
            "scores": [float(REWARD[i]) for i in chosen],
        }
        row["old_logprobs"] = policy.logprobs(batch_of([row])).detach().view(n, 2).tolist()
        rows.append({**row, **columns})
        likely.append(policy.log_policy().detach().exp()[list(chosen)].prod())
    return rows, torch.stack(likely)


def gradient(policy: nn.Module, value: torch.Tensor) -> torch.Tensor:
    policy.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def exact(policy: Tree, reference: Tree | None = None, beta: float = 0.0) -> torch.Tensor:
    """Of minus the expected reward, less beta times the KL to the reference."""
    logp, price = policy.log_policy(), 0.0
    if reference:
        price = beta * (logp - reference.log_policy().detach())
    return gradient(policy, -(logp.exp() * (REWARD - price)).sum())


def expected(spec, n: int, roles, stage=None, **columns) -> torch.Tensor:
    """Of an objective, over all draws of n completions for a prompt."""
    objective, policy = build("objective", spec), roles.policy
    rows, likely = every_draw(policy, n, **columns)
    if stage:
        rows = list(build("stage", stage)(rows, roles))
    batch = batch_of(rows)
    weights = likely[objective.rows_of_units(batch)]
    return gradient(policy, (weights * objective.loss(roles, batch)).sum() / n)


@pytest.mark.parametrize(
    "spec, n, factor",
    [
        ({"name": "rloo", "beta": 0.0}, 2, 1),
        ({"name": "remax", "beta": 0.0}, 1, 1),
        # a completion's own reward is in its group's mean; tokens are averaged over two
        ({"name": "grpo", "beta": 0.0, "scale_rewards": "none"}, 2, 1 / 4),
        ({"name": "gspo", "scale_rewards": "none"}, 2, 1 / 4),
        ({"name": "dapo", "scale_rewards": "none"}, 2, 1 / 2),
        ({"name": "cispo", "scale_rewards": "none"}, 2, 1 / 2),
        ({"name": "dr_grpo", "max_completion_length": 1}, 2, 1 / 2),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_the_expected_gradient_is_the_exact_one(spec, n, factor):
    policy = Tree()
    found = expected(spec, n, roles_of(policy), baseline=0.4)
    torch.testing.assert_close(found, factor * exact(policy), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_the_kl_in_the_reward_is_the_exact_one(name):
    policy, reference = Tree(), Tree(1)
    found = expected({"name": name, "beta": 0.3}, 2, roles_of(policy, reference), baseline=0.4)
    torch.testing.assert_close(found, exact(policy, reference, 0.3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "spec, stage, n",
    [
        ("reinforce_pp", {"baseline": "none"}, 1),
        ("reinforce_pp", {"baseline": "none", "kl_coef": 0.3}, 1),
        # with a critic that is right no lambda is biased
        ({"name": "ppo", "vf_coef": 0.0}, {"baseline": "critic", "lam": 1.0}, 1),
        ({"name": "ppo", "vf_coef": 0.0}, {"baseline": "critic", "lam": 0.3}, 1),
    ],
)
def test_advantages_of_tokens_give_the_exact_gradient(spec, stage, n):
    policy, reference = Tree(), Tree(1)
    roles = roles_of(policy, reference)
    found = expected(spec, n, roles, {"name": "advantages", "whiten": False, **stage})
    beta = stage.get("kl_coef", 0.0)
    torch.testing.assert_close(found, exact(policy, beta and reference, beta), atol=1e-6, rtol=1e-5)


def test_ppo_with_a_critic_varies_less():
    """Its gradient's second moment, against that of rewards alone, which are not centred."""
    policy, sizes = Tree(), []
    for stage in ({"baseline": "none"}, {"baseline": "critic", "lam": 0.5}):
        rows, likely = every_draw(policy, 1)
        rows = build("stage", {"name": "advantages", "whiten": False, **stage})(rows, roles_of(policy))
        size = 0.0
        for row, p in zip(rows, likely, strict=True):
            loss = build("objective", "reinforce_pp").loss(roles_of(policy), batch_of([row])).sum()
            size += float(p * gradient(policy, loss).square().sum())
        sizes.append(size)
    assert sizes[1] < 0.8 * sizes[0]


def remax_by_sequence(policy: Tree, baseline: float) -> torch.Tensor:
    """[9, parameters] the gradient from each sequence, rewards between 1 and 3."""
    found, objective = [], build("objective", {"name": "remax", "beta": 0.0})
    for i, sequence in enumerate(SEQUENCES):
        row = {"id": "r", "prompt": [0], "completions": [list(sequence)], "scores": [2 + float(REWARD[i])]}
        loss = objective.loss(roles_of(policy), batch_of([{**row, "baseline": baseline}])).sum()
        found.append(gradient(policy, loss))
    return torch.stack(found)


def test_remax_is_unbiased_and_its_baseline_lowers_the_variance():
    policy = Tree()
    likely, want = policy.log_policy().detach().exp(), exact(policy)
    greedy = 2 + float(REWARD[int(likely.argmax())])
    draws = torch.multinomial(likely, 100_000, True, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(draws, minlength=len(SEQUENCES)).double() / len(draws)
    variances = []
    for baseline in (greedy, 0.0):
        each = remax_by_sequence(policy, baseline)
        variances.append(float((likely[:, None] * (each - want).square()).sum()))
    mean = (shares[:, None] * remax_by_sequence(policy, greedy)).sum(0)
    assert float((mean - want).norm()) < 0.01 * float(want.norm())
    assert variances[0] < 0.3 * variances[1]


def test_remax_learns_nothing_from_a_constant_or_greedy():
    policy = Tree()
    rows, _ = every_draw(policy, 1)
    same = [{**row, "scores": [0.7], "baseline": 0.7} for row in rows]
    objective = build("objective", {"name": "remax", "beta": 0.0})
    assert not gradient(policy, objective.loss(roles_of(policy), batch_of(same)).sum()).any()
    best = max(rows, key=lambda row: sum(row["old_logprobs"][0]))
    greedy = [{**best, "baseline": best["scores"][0]}]
    assert not gradient(policy, objective.loss(roles_of(policy), batch_of(greedy)).sum()).any()


def test_remax_reaches_the_best_arm():
    policy, rng = Tree(), torch.Generator().manual_seed(0)
    objective, adam = (
        build("objective", {"name": "remax", "beta": 0.0}),
        torch.optim.Adam(policy.parameters(), 0.1),
    )
    for _ in range(150):
        likely = policy.log_policy().detach().exp()
        greedy = float(REWARD[int(likely.argmax())])
        rows = []
        for i in torch.multinomial(likely, 16, True, generator=rng).tolist():
            row = {
                "id": "r",
                "prompt": [0],
                "completions": [list(SEQUENCES[i])],
                "scores": [float(REWARD[i])],
            }
            rows.append({**row, "baseline": greedy})
        adam.zero_grad()
        objective.loss(roles_of(policy), batch_of(rows)).mean().backward()
        adam.step()
    assert float(policy.log_policy().detach().exp()[int(REWARD.argmax())]) > 0.95


def test_gspo_clips_whole_completions():
    """One far token is enough to silence its completion, and only it."""
    policy = Tree()
    rows, _ = every_draw(policy, 2)
    row = rows[1]
    row["old_logprobs"] = [
        [row["old_logprobs"][0][0] - 0.5, row["old_logprobs"][0][1]],
        row["old_logprobs"][1],
    ]
    row["scores"] = [1.0, 0.0]
    batch = batch_of([row])
    loss = build("objective", "gspo").loss(roles_of(policy), batch)
    assert not gradient(policy, loss[0]).any()
    assert batch.metrics["clip_ratio"] == (2.0, 4)


def test_cut_completions_teach_nothing_where_they_are_masked():
    policy = Tree()
    rows, _ = every_draw(policy, 2)
    cut = [{**rows[1], "truncated": [True, False]}]
    objective = build("objective", {"name": "dapo", "mask_truncated_completions": True})
    values = objective.loss(roles_of(policy), batch_of(cut))
    assert not values[:2].any() and values[2:].all()
    assert objective.divisor(batch_of(cut)) == 2
    assert "truncated" in objective.active_requires


def test_nash_md_is_the_gradient_of_winning_against_the_mixture():
    """Over all pairs of the policy's sample and the opponent's, with the KL to the reference."""
    policy, reference, opponent = Tree(), Tree(1), Tree(2)
    rows, likely = every_draw(policy, 2, opponent=[False, True])
    against = opponent.log_policy().detach().exp()
    weights = (policy.log_policy().detach().exp()[:, None] * against).flatten()
    objective, batch = build("objective", {"name": "nash_md", "beta": 0.3}), batch_of(rows)
    values = objective.loss(roles_of(policy, reference), batch).view(-1, 2)
    assert not values[:, 1].any() and objective.divisor(batch) == len(rows)
    found = gradient(policy, (weights * values[:, 0]).sum())
    wins = torch.sigmoid(REWARD[:, None] - REWARD) @ against
    logp = policy.log_policy()
    price = 0.3 * (logp - reference.log_policy().detach())
    torch.testing.assert_close(
        found, gradient(policy, -(logp.exp() * (wins - price)).sum()), atol=1e-6, rtol=1e-5
    )
