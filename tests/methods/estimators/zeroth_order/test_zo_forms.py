"""zo_sign and zo_conservative: the length of a step, and a loss that never rises."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import Rig
from luthier.clock import Clock
from luthier.methods.estimators.zeroth_order.mezo import direction
from luthier.registry import build


def rig(name, rate, **settings):
    chain = build("optimizer", {"name": "sgd", "max_grad_norm": 0}).chain()
    run = Rig(estimator={"name": name, **settings}, transforms=chain, learning_rate=rate, total=60)
    run.chain.factor = lambda step: 1.0
    return run


def test_a_step_along_the_sign_has_the_length_of_its_direction():
    run = rig("zo_sign", 0.01)
    before, loss = run.tuner.tensors(), run.distance()
    run.go(1)
    after, clock = run.tuner.tensors(), Clock(seed=3)
    signs = set()
    for group in run.tuner.param_groups():
        for slot, p in group.params.items():
            name, z = f"{group.name}.{slot}", direction(clock, 0, group.name, slot, p)
            moved = (before[name] - after[name]) / 0.01
            sign = float(torch.sign((moved * z).sum()))
            signs.add(sign)
            assert torch.allclose(moved, sign * z, atol=1e-4)
            assert torch.isclose(moved.norm(), z.norm(), rtol=1e-4)
    assert len(signs) == 1 and run.distance() < loss


def test_a_conservative_step_never_makes_the_loss_larger():
    """Even at a rate at which plain steps do; the losses of the toy do not depend on the step."""
    run, plain = rig("zo_conservative", 0.3), rig("mezo", 0.3)
    losses = [run.distance()]
    rises = 0
    for _ in range(40):
        run.go(1)
        losses.append(run.distance())
        before = plain.distance()
        plain.go(1)
        rises += not plain.distance() <= before
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] and rises > 0
    assert any(a == b for a, b in zip(losses, losses[1:], strict=False))  # where both steps are worse


def test_a_conservative_step_is_mezos_where_that_is_best():
    run, plain = rig("zo_conservative", 1e-3), rig("mezo", 1e-3)
    run.go(1), plain.go(1)
    for k, p in run.tuner.tensors().items():
        assert torch.allclose(p, plain.tuner.tensors()[k], atol=1e-6)


@pytest.mark.parametrize("name", ["mezo", "sparse_mezo", "just_one_byte", "zo_sign", "zo_conservative"])
def test_what_is_said_of_a_clip_names_the_estimator(name):
    """And zoodip, whose estimate is as long as a gradient, has nothing to say."""
    chain = build("optimizer", {"name": "sgd", "max_grad_norm": 1.0}).chain()
    (sentence,) = build("estimator", name).chain_warnings(chain)
    assert sentence.startswith(f"estimator '{name}': the norm of its estimate is")
    assert "max_grad_norm 1 clips nearly all of it" in sentence
    assert not build("estimator", "zoodip").chain_warnings(chain)
