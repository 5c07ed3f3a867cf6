"""mixout: is the gradient of the mixed weights; is unbiased; stays nearer to the start."""

from __future__ import annotations

import torch

from helpers.optimizers import Rig, Seen, same
from luthier.registry import build


def mixed(rig, start) -> tuple[dict, dict]:
    """What each number's distance from the start is multiplied by in this step, and the mixed weights."""
    mixout = rig.estimator
    scales = {}
    for group in rig.tuner.param_groups():
        for slot, p in group.params.items():
            scales[f"{group.name}.{slot}"] = mixout.scale(rig.clock, group.name, slot, p)
    own = rig.tuner.tensors()
    return scales, {k: start[k] + (own[k] - start[k]) * scales[k] for k in scales}


def test_mixout_is_the_gradient_of_the_mixed_weights():
    rig = Rig(estimator={"name": "mixout", "p": 0.5}, transforms=(seen := Seen(),))
    start = rig.tuner.tensors()
    rig.go(2)
    scales, weights = mixed(rig, start)
    own = rig.tuner.tensors()
    assert any(bool((s == 0).any()) for s in scales.values()) and set(
        scales["weight.weight"].unique().tolist()
    ) == {0.0, 2.0}
    want = {k: 2 * (weights[k] - rig.target[k]) / weights[k].numel() * scales[k] for k in weights}
    rig.chain.learning_rate = 0.0
    rig.go(1)
    assert all(torch.allclose(seen.grads[k], want[k], atol=1e-6) for k in want)
    assert all(torch.equal(t, own[k]) for k, t in rig.tuner.tensors().items())  # and they are put back
    assert same(Rig(estimator={"name": "mixout", "p": 0.0}).go(4), Rig().go(4))


def test_mixout_is_unbiased():
    rig = Rig(estimator={"name": "mixout", "p": 0.7})
    p, total = torch.zeros(50), 0
    for rig.clock.step in range(400):
        total = total + build("estimator", {"name": "mixout", "p": 0.7}).scale(rig.clock, "a", "b", p)
    assert abs(float((total / 400).mean()) - 1) < 0.05


def test_mixout_stays_nearer_to_the_start():
    ends = {}
    for name in ("backprop", "mixout"):
        rig = Rig(estimator=name, total=40, learning_rate=0.5)
        start = rig.tuner.tensors()
        rig.go(40)
        ends[name] = sum(float((t - start[k]).square().sum()) for k, t in rig.tuner.tensors().items())
    assert ends["mixout"] < 0.9 * ends["backprop"]
