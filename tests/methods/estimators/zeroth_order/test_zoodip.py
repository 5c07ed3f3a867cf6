"""zoodip: one-sided estimates, without the directions that the history did not use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.optimizers import Rig, Seen
from luthier.clock import Clock
from luthier.errors import Refused
from luthier.methods.estimators.zeroth_order.mezo import direction
from luthier.methods.estimators.zeroth_order.zoodip import past_of, trailing_components, without
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import build
from luthier.train.optimizer import Chain


def chain_of(model, transforms, total=1, rate=0.0):
    tuner = TunedWeights(SimpleNamespace(name="toy"), model, lambda name, p: name == "weight")
    return Chain(transforms, tuner, Clock(total=total), rate)


def test_no_part_along_trailing_components_is_left():
    """Points of a plane, with a little noise: all but the plane is removed."""
    torch.manual_seed(0)
    values = torch.randn(20, 2) @ torch.randn(2, 10) + 1e-3 * torch.randn(20, 10)
    basis = trailing_components(values, nu=1e-3)
    assert basis.shape == (8, 10) and torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-5)
    rest = without(g := torch.randn(2, 5), basis)
    assert (basis @ rest.flatten()).abs().max() < 1e-6 and not torch.allclose(rest, g)

    run = Rig(estimator={"name": "zoodip", "tau": 8, "nu": 0.3}, transforms=(seen := Seen(),), total=20)
    run.go(8)
    bases = {}
    for group in run.chain.param_groups():
        for slot in group.params:
            bases[f"{group.name}.{slot}"] = past_of(run.chain, group.name, slot)["basis"].clone()
    assert all(0 < len(basis) < 8 for basis in bases.values())
    run.go(1)
    for key, basis in bases.items():
        # in proportion to the gradient, whose length is that of noise in 84 dimensions
        assert (basis @ seen.grads[key].flatten()).abs().max() < 1e-5 * (1 + seen.grads[key].norm())


def test_without_trailing_components_it_is_the_estimate():
    assert len(trailing_components(torch.ones(4, 6), nu=1e-3)) == 0
    basis = trailing_components(torch.randn(4, 6), nu=0.0)
    assert len(basis) == 0 and torch.equal(without(g := torch.randn(6), basis), g)

    run = Rig(estimator={"name": "zoodip", "n_probes": 2}, transforms=(seen := Seen(),), learning_rate=0.0)
    start, here = run.tuner.tensors(), run.distance()
    run.go(1)
    slopes, zs = [], []
    for probe in range(2):
        z = {}
        for group in run.tuner.param_groups():
            for slot, p in group.params.items():
                z[f"{group.name}.{slot}"] = direction(Clock(seed=3), probe, group.name, slot, p)
        with run.tuner.using({key: start[key] + 1e-3 * z[key] for key in z}):
            slopes.append((run.distance() - here) / 1e-3)
        zs.append(z)
    size = sum(p.numel() for p in start.values())
    for key in start:
        estimate = (slopes[0] * zs[0][key] + slopes[1] * zs[1][key]) / (2 * ((size + 1) / 2) ** 0.5)
        assert torch.allclose(seen.grads[key], estimate, atol=2e-3)


@pytest.mark.long
def test_it_points_along_the_gradient():
    torch.manual_seed(0)
    model, goal = nn.Linear(32, 1, bias=False).double(), torch.randn(32).double()
    loss = lambda grad=False: (model.weight[0] - goal).tanh().square().sum()
    gradient = torch.autograd.grad(loss(), model.weight)[0][0]
    chain = chain_of(model, (seen := Seen(),))
    method = build("estimator", {"name": "zoodip", "n_probes": 2000})
    method.step(lambda grad: float(loss().detach()), chain, chain.clock)
    assert torch.cosine_similarity(next(iter(seen.grads.values()))[0].double(), gradient, 0) > 0.9


def test_a_denoiser_of_bytes_is_personalized():
    """A word's vector moves; the weights that read it are bytes, and stay."""
    torch.manual_seed(1)
    word = nn.Linear(8, 1, bias=False)
    codes, scale = torch.randint(-127, 128, (4, 12), dtype=torch.int8), 0.02 / 4
    before, clean = codes.clone(), torch.randn(64, 4)
    noise = torch.randn(64, 4)
    ideal = torch.randn(8)

    def predicted(vector):
        place = torch.cat([0.6 * clean + 0.8 * noise, vector.expand(64, 8)], 1)
        return torch.tanh(place @ (codes.float() * scale).T)

    target = predicted(ideal)

    def loss(grad=False):
        return float((predicted(word.weight.detach()[0]) - target).square().mean())

    optimizer = build("optimizer", {"name": "adamw", "adam_epsilon": 1e-3, "max_grad_norm": 0})
    chain = chain_of(word, optimizer.chain(), total=300, rate=3e-2)
    method, began = build("estimator", {"name": "zoodip", "n_probes": 2, "tau": 64}), loss()
    for chain.clock.step in range(300):
        method.step(loss, chain, chain.clock)
    assert loss() < 0.5 * began and torch.equal(codes, before)


def test_a_history_that_does_not_fit_is_refused():
    chain = chain_of(nn.Linear(4096, 4096, bias=False), ())
    with pytest.raises(Refused, match="smaller tau"):
        build("estimator", "zoodip").step(lambda grad: 0.0, chain, chain.clock)
