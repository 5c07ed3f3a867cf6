"""sharpening: best-of-n finds the likeliest answer, the regression's optimum is a power of the base."""

from __future__ import annotations

import torch

from helpers.objectives import fitted
from helpers.rounds import Table, perform, roles_of
from luthier.registry import build
from luthier.toy import bandit

NAMES = [f"w{k}" for k in range(6)]
PROMPTS = [{"id": str(p), "prompt": [p]} for p in range(5)]


def table() -> Table:
    return Table(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))


def test_the_best_of_many_is_the_likeliest():
    policy = table()
    roles = roles_of(policy, NAMES, reference=policy)
    rows = build("stage", {"name": "rollout", "n": 200})(PROMPTS, roles)
    best = build("stage", "best")(build("stage", "likelihood")(rows, roles), roles)
    likeliest = policy.log_policy().argmax(-1).tolist()
    assert [row["completions"][0][0] for row in best] == likeliest


def test_the_optimum_is_the_power_of_the_base():
    beta, base = 0.5, torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log()
    roles = bandit.roles_of(bandit.Arms(base))
    rows = bandit.pulled([[0, 1, 2, 3]], base)
    policy = fitted(build("objective", {"name": "rebel", "beta": beta}), roles, rows, steps=200)
    torch.testing.assert_close(policy.exp(), ((1 + 1 / beta) * base).softmax(-1), atol=1e-5, rtol=0)


def test_the_loss_is_that_over_all_pairs():
    policy = bandit.Arms(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        policy.weights += torch.randn(5, generator=torch.Generator().manual_seed(1))
    rows = bandit.pulled([[0, 3, 2]], torch.arange(5.0))
    loss = build("objective", {"name": "rebel", "beta": 0.3}).loss(
        bandit.roles_of(policy), bandit.batch_of(rows)
    )
    gap = 0.3 * (policy.log_policy() - policy.base.log_softmax(-1)) - torch.arange(5.0)
    pairs = [(gap[a] - gap[b]).square() for a, b in ((0, 3), (0, 2), (3, 2))]
    torch.testing.assert_close(loss, torch.stack(pairs).mean()[None])


def test_samples_become_likelier_under_the_base(recipe, tmp_path):
    for form, beta in (("sft", 1.0), ("rl", 1.0)):
        base = table()
        plan = {"name": "sharpening", "n": 8, "form": form, "beta": beta, "rounds": 2}
        rounds, end = perform(plan, recipe, base, PROMPTS, NAMES, tmp_path / form, steps=20, lr=0.2)
        logs = base.log_policy().detach()
        likely = [
            float((r.log_policy().detach().exp() * logs).sum(-1).mean())
            for r in (base, rounds[0].after, rounds[1].after)
        ]
        assert likely[0] < likely[1] < likely[2]
        assert (
            rounds[1].reference is base
            and end.stats["rounds"][1]["reward"] > end.stats["rounds"][0]["reward"]
        )
