"""variational: gradients of the bound, backprop as a special case, and the prior where there is no loss."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import Normal, kl_divergence

from helpers.optimizers import Rig, Seen, same
from luthier.methods.estimators.first_order._posterior import ENTRY, LOG_SIGMA

SETTINGS: Any = {"name": "variational", "kl_weight": 0.1, "prior_sigma": 0.5, "init_sigma": 0.2}


def test_gradients_are_those_of_the_bound():
    """Of mean and log sigma, by autograd through a draw with the same noise and torch's divergence."""
    settings: Any = {**SETTINGS, "sigma_rate": 0.01}
    rig = Rig(estimator=settings, transforms=(seen := Seen(),))
    rig.go(3)
    before = {}
    for group in rig.tuner.param_groups():
        own = rig.chain.state[group.name][ENTRY]
        for slot, p in group.params.items():
            sigma, moment = own[LOG_SIGMA][slot].clone(), own["first"][slot].clone()
            noise = rig.estimator.noise(rig.clock, group.name, slot, p)
            before[group.name, slot] = (p.detach().clone(), sigma, noise, moment)
    rig.go(1)
    for (group, slot), (mean, log_sigma, noise, moment) in before.items():
        mean, log_sigma = mean.requires_grad_(), log_sigma.requires_grad_()
        target = rig.target[f"{group}.{slot}"]
        loss = (mean + log_sigma.exp() * noise - target).square().mean()
        divergence = kl_divergence(Normal(mean, log_sigma.exp()), Normal(0.0, 0.5)).sum()
        (loss + 0.1 * divergence).backward()
        assert mean.grad is not None and log_sigma.grad is not None
        assert torch.allclose(seen.grads[f"{group}.{slot}"], mean.grad, atol=1e-5)
        own = rig.chain.state[group][ENTRY]
        assert torch.allclose((own["first"][slot] - 0.9 * moment) / 0.1, log_sigma.grad, atol=1e-4)


def test_without_spread_and_prior_it_is_backprop():
    settings: Any = {**SETTINGS, "kl_weight": 0, "init_sigma": 0, "sigma_rate": 0}
    rig = Rig(estimator=settings).go(4)
    assert same(rig, Rig().go(4))


def test_without_a_loss_the_posterior_becomes_the_prior():
    settings: Any = {**SETTINGS, "kl_weight": 1.0, "sigma_rate": 0.02}
    rig = Rig(estimator=settings, total=200, learning_rate=0.05)
    rig.target = {k: torch.zeros_like(t) for k, t in rig.target.items()}
    rig.closure = lambda *args, **kwargs: zero(rig)
    rig.go(200)
    for group in rig.tuner.param_groups():
        own = rig.chain.state[group.name][ENTRY]
        for slot, p in group.params.items():
            assert float(p.abs().max()) < 0.05
            assert torch.allclose(own[LOG_SIGMA][slot].exp(), torch.tensor(0.5), atol=0.05)


def zero(rig: Rig) -> float:
    for p in rig.tuner.parameters().values():
        p.grad = torch.zeros_like(p)
    return 0.0
