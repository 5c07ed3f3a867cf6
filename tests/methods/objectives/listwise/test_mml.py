"""mml: marginal likelihood at one end, all answers alike at the other, and the gradient between them."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, cast, gradients, loss_of, make_rows
from luthier.registry import build


def test_it_is_marginal_likelihood_and_its_limit():
    roles, rows = cast(), make_rows(3, k=3)
    batch = batch_of(rows)
    logps = batch.sums(roles.policy.logprobs(batch)).detach().view(3, 3)
    close = {"atol": 1e-5, "rtol": 1e-5}
    marginal = -logps.double().exp().sum(1).log().float()
    torch.testing.assert_close(loss_of({"name": "mml", "beta": 1.0}, roles, rows).detach(), marginal, **close)
    alike = loss_of({"name": "mml", "beta": 0.0}, roles, rows).detach()
    torch.testing.assert_close(alike, -logps.mean(1), **close)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_gradient_is_weighted_likelihood(beta):
    roles, rows = cast(), make_rows(3, k=3)
    net = roles.policy.network if hasattr(roles.policy, "network") else roles.policy
    batch = batch_of(rows)
    logps = batch.sums(roles.policy.logprobs(batch))
    weights = (beta * logps.detach().view(3, 3)).softmax(1).flatten()
    (-(weights * logps).sum()).backward()
    by_hand = gradients(net)
    net.zero_grad()
    build("objective", {"name": "mml", "beta": beta}).loss(roles, batch_of(rows)).sum().backward()
    for name, ours in gradients(net).items():
        torch.testing.assert_close(ours, by_hand[name], atol=1e-5, rtol=1e-4)
