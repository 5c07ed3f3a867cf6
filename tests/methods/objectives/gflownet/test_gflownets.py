"""trajectory_balance, order_preserving: exact distributions of enumerable tasks, and what only the order
decides.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from helpers.objectives import cast, loss_of, make_rows
from luthier.registry import build
from luthier.toy import bandit

SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=4)))  # [81, 4]
BETA = 3.0
BINS = torch.linspace(0, 1, 10)


def rewards() -> torch.Tensor:
    """[81, 2] two goals in conflict: tokens 0 early, tokens 2 late; never 0."""
    early = (SEQUENCES[:, :2] == 0).float().mean(1)
    late = (SEQUENCES[:, 1:] == 2).float().mean(1)
    return 0.1 + 0.9 * torch.stack([early, late], 1)


class Conditional(nn.Module):
    """A policy over sequences for every weight of the first goal, and log Z of it; both read thermometer
    codes.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.policy = nn.Sequential(
            nn.Linear(12 + 4 + 10, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 3)
        )
        self.z = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 1))
        states = []
        for length in range(4):
            seen = torch.zeros(len(SEQUENCES), 4, 3)
            seen[:, :length] = nn.functional.one_hot(SEQUENCES[:, :length], 3).float()
            place = nn.functional.one_hot(torch.tensor(length), 4).float().expand(len(SEQUENCES), 4)
            states.append(torch.cat([seen.flatten(1), place], 1))
        self.states = torch.stack(states, 1)  # [81, 4, 16]

    @staticmethod
    def code(weights: torch.Tensor) -> torch.Tensor:
        """[W] -> [W, 10] how full each of ten cups is."""
        return ((weights[:, None] - BINS) * 9 + 1).clamp(0, 1)

    def table(self, weights: torch.Tensor) -> torch.Tensor:
        """[W] -> [W, 81, 4] log-probabilities of each token of every sequence."""
        code = self.code(weights)[:, None, None].expand(-1, len(SEQUENCES), 4, -1)
        logits = self.policy(torch.cat([self.states.expand(len(weights), -1, -1, -1), code], -1))
        chosen = SEQUENCES[None, :, :, None].expand(len(weights), -1, -1, 1)
        return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)

    def logprobs(self, batch):
        return self.table(torch.tensor([row["weights"][0] for row in batch.rows])).flatten()

    def value(self, policy, batch):
        weights = torch.tensor([row["weights"][0] for row in batch.rows])
        return self.z(self.code(weights)).squeeze(-1)[batch.group]


def every_sequence(n: int):
    """A batch of n rows with all sequences; weights and scores are set at each step."""
    from luthier.model.batch import collate
    from luthier.text.encode import Encoded

    completions = [sequence.tolist() for sequence in SEQUENCES]
    rows = [{"id": str(i), "prompt": [0], "completions": completions} for i in range(n)]
    marks = [[True] * 4] * len(completions)
    return collate(rows, lambda row: Encoded(row["prompt"], row["completions"], marks))


@pytest.mark.slow
def test_it_samples_in_proportion_for_unseen_weights():
    """Total variation to R^beta / Z, log Z, and the hypervolume of samples against one policy gradient's
    best.
    """
    net, values, rng = Conditional(), rewards(), torch.Generator().manual_seed(0)
    roles = SimpleNamespace(policy=net, log_partition=net)
    objective = build("objective", {"name": "trajectory_balance", "beta": BETA, "log_z": "learned"})
    batch, steps = every_sequence(4), 1000
    adam = torch.optim.Adam(
        [{"params": net.policy.parameters()}, {"params": net.z.parameters(), "lr": 1e-2}], 4e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        for row, weight in zip(batch.rows, torch.rand(4, generator=rng).tolist(), strict=True):
            row["weights"] = [weight, 1 - weight]
            row["scores"] = (values @ torch.tensor(row["weights"])).tolist()
        adam.zero_grad()
        objective.loss(roles, batch).mean().backward()
        adam.step()
        schedule.step()
    for weight in (0.15, 0.5, 0.85):
        scaled = (values @ torch.tensor([weight, 1 - weight])).log() * BETA
        with torch.no_grad():
            likely = net.table(torch.tensor([weight])).sum(-1)[0].exp()
            log_z = float(net.z(net.code(torch.tensor([weight]))))
        assert float((likely - scaled.softmax(0)).abs().sum() / 2) < 0.05
        assert log_z == pytest.approx(float(scaled.logsumexp(0)), abs=0.05)
    assert hypervolume(net, values, rng) >= single_volume(values)


def hypervolume(net, values, rng) -> float:
    """Of samples for an even grid of weights, 20 of each."""
    import moocore

    with torch.no_grad():
        likely = net.table(torch.linspace(0, 1, 11)).sum(-1).exp()
    drawn = torch.multinomial(likely, 20, True, generator=rng).flatten()
    return float(moocore.hypervolume(-values[drawn].double().numpy(), ref=[0.0, 0.0]))


def single_volume(values) -> float:
    """Of the one sequence that a policy gradient on the even sum ends at."""
    return float(values[int(values.sum(1).argmax())].prod())


def test_the_estimate_within_a_row_is_the_variance():
    """With log Z estimated the loss is the variance of log p - beta log R; at R^beta / Z it is 0, for one
    reward as well.
    """
    rows, roles = make_rows(2, k=4), cast()
    for row in rows:
        row["scores"] = [0.5, 1.0, 2.0, 0.0]
    values = loss_of({"name": "trajectory_balance", "beta": 2.0, "least": 0.1}, roles, rows)
    from helpers.objectives import batch_of

    batch = batch_of(rows)
    gap = batch.sums(roles.policy.logprobs(batch)) - 2 * torch.tensor([0.5, 1.0, 2.0, 0.1] * 2).log()
    torch.testing.assert_close(values.view(2, 4).mean(1), gap.view(2, 4).var(1, unbiased=False))
    reward = torch.tensor([1.0, 2.0, 5.0])
    policy = bandit.Arms(2 * reward.log())
    arms = bandit.batch_of(bandit.pulled([[0, 1, 2]], reward))
    loss = build("objective", {"name": "trajectory_balance", "beta": 2.0}).loss(bandit.roles_of(policy), arms)
    assert float(loss.detach().abs().max()) < 1e-9


def learn(objective, columns, steps: int, watch=lambda policy: None) -> bandit.Arms:
    """16 arms, sets of 4: half drawn by the policy, half evenly."""
    policy, rng = bandit.Arms(torch.zeros(16)), torch.Generator().manual_seed(0)
    roles, adam = bandit.roles_of(policy), torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(steps):
        likely = policy.log_policy().detach().exp()
        own = torch.stack([torch.multinomial(likely, 4, generator=rng) for _ in range(4)])
        even = torch.stack([torch.randperm(16, generator=rng)[:4] for _ in range(4)])
        rows = []
        for place, arms in enumerate(torch.cat([own, even]).tolist()):
            row = {"id": str(place), "prompt": [0], "completions": [[a] for a in arms]}
            rows.append({**row, **columns(arms)})
        adam.zero_grad()
        objective.loss(roles, bandit.batch_of(rows)).mean().backward()
        adam.step()
        watch(policy)
    return policy


def test_the_order_is_learned():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).float()
    mass: list[float] = []
    policy = learn(
        build("objective", "order_preserving"),
        lambda arms: {"scores": [float(order[a]) for a in arms]},
        200,
        lambda policy: mass.append(float(policy.log_policy().detach().exp()[int(order.argmax())])),
    )
    assert kendalltau(policy.log_policy().detach().numpy(), order.numpy()).statistic > 0.9
    assert mass[20] < mass[60] < mass[199]


@pytest.mark.parametrize("over", ["pairs", "set"])
def test_only_the_order_counts(over):
    rows, roles = make_rows(3, k=4), cast()
    spec = {"name": "order_preserving", "over": over}
    plain = loss_of(spec, roles, rows)
    for change in (lambda s: s**3 - 7, lambda s: 100 * s, lambda s: float(torch.tensor(s).exp())):
        other = [{**row, "scores": [change(s) for s in row["scores"]]} for row in rows]
        assert torch.equal(loss_of(spec, roles, other), plain)


def test_pareto_points_get_the_mass():
    rng = torch.Generator().manual_seed(3)
    values = torch.rand(16, 2, generator=rng)
    dominated = torch.tensor([bool(((values >= v).all(1) & (values > v).any(1)).any()) for v in values])
    columns = {name: values[:, k].tolist() for k, name in enumerate(("a", "b"))}
    policy = learn(
        build("objective", {"name": "order_preserving", "over": "set", "rewards": ["a", "b"]}),
        lambda arms: {"scores": [0.0] * 4, "rewards": {n: [c[a] for a in arms] for n, c in columns.items()}},
        250,
    )
    likely = policy.log_policy().detach()
    assert float(likely[~dominated].min()) > float(likely[dominated].max())
