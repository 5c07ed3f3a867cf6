"""d3po: is dpo step by step."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from helpers.objectives import batch_of, cast, gradients, loss_of, network, pair_rows
from luthier.registry import build
from luthier.toy import bandit, diffusion


def test_d3po_is_dpo_step_by_step():
    rows = pair_rows()
    at_start = loss_of("d3po", cast(reference=network()), rows)
    torch.testing.assert_close(at_start, torch.full_like(at_start, 0.6931472), atol=1e-5, rtol=0)
    made, batch = build("objective", {"name": "d3po", "eps": 0.999}), batch_of(rows)
    shorter = [min(len(r["completions"][0]), len(r["completions"][1])) for r in rows]
    assert made.count(batch) == sum(shorter)
    near = cast(reference=network(off_by=0.002))
    # one step a side, and no ratio near its bounds
    whole = loss_of({"name": "d3po", "eps": 0.5, "step": 100}, near, rows)
    torch.testing.assert_close(whole, loss_of("dpo", near, rows), atol=1e-5, rtol=1e-5)
    far = cast(reference=network(seed=3))
    loss = build("objective", {"name": "d3po", "eps": 1e-6}).loss(far, batch)
    loss.sum().backward()
    assert all(not g.any() for g in gradients(far.policy.model).values()), (
        "beyond the bounds a step teaches nothing"
    )


def roles_of(policy, reference):
    roles = bandit.roles_of(bandit.Arms(torch.zeros(2)))
    roles.__dict__ |= {"policy": policy, "reference": reference}
    return roles


def drawn(policy, reference, n: int, seed: int):
    """Pairs of trajectories of the policy, the one that ends further to the right preferred."""
    points = policy.sample(n, torch.Generator().manual_seed(seed))
    reference.follow(policy)
    return diffusion.batch_of(diffusion.pairs(points[:, 0].tolist(), policy.steps)), points


def test_on_gaussian_steps_it_is_dpo_of_their_densities():
    """log 2 at the start; else DPO on s = x_t, a = x_(t-1); beyond the bounds no gradient at all."""
    torch.manual_seed(0)
    policy = diffusion.Denoiser()
    reference = copy.deepcopy(policy)
    batch, points = drawn(policy, reference, 8, seed=0)
    at_start = build("objective", "d3po").loss(roles_of(policy, reference), batch)
    torch.testing.assert_close(at_start, torch.full((4 * 20,), 2.0).log())

    torch.nn.init.normal_(policy.learned[2].weight, std=1e-3)
    loss = build("objective", {"name": "d3po", "eps": 0.9, "beta": 0.7}).loss(
        roles_of(policy, reference), batch
    )
    densities = []
    for net in (policy, reference):
        mean, deviation = net.step(policy.before, policy.time)
        densities.append(
            torch.distributions.Normal(mean, deviation).log_prob(policy.after).sum(1).view(8, 20)
        )
    ratios = densities[0] - densities[1]
    first, second = ratios[0::2], ratios[1::2]
    right = (points[0::2, 0] > points[1::2, 0])[:, None]
    margin = torch.where(right, first - second, second - first)
    torch.testing.assert_close(loss, -F.logsigmoid(0.7 * margin).flatten(), atol=1e-6, rtol=1e-6)

    torch.nn.init.normal_(policy.learned[2].weight, std=3.0)
    far = build("objective", {"name": "d3po", "eps": 1e-4})
    far.loss(roles_of(policy, reference), batch).sum().backward()
    assert all(not p.grad.any() for p in policy.parameters())


def test_a_preference_moves_the_samples_of_a_diffusion():
    """Samples of the policy, drawn anew each time; further to the right is better: the mean of the samples
    moves there, and that of the reference stays.
    """
    torch.manual_seed(0)
    policy = diffusion.Denoiser(steps=10)
    reference = copy.deepcopy(policy)
    aim, adam = build("objective", "d3po"), torch.optim.Adam(policy.learned.parameters(), 3e-3)
    for epoch in range(40):
        batch, _ = drawn(policy, reference, 64, seed=epoch)
        adam.zero_grad()
        aim.loss(roles_of(policy, reference), batch).mean().backward()
        adam.step()
    ends = [net.sample(2000, torch.Generator().manual_seed(99)).mean(0) for net in (policy, reference)]
    right, up = (ends[0] - ends[1]).tolist()
    assert right > 0.2 and abs(up) < right / 2 and abs(float(ends[1][0])) < 0.05, (right, up)
