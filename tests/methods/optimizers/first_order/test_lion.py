"""lion: by its closed form; moves every weight alike and without memory is the sign."""

from __future__ import annotations

import torch

from helpers.optimizers import Rig
from luthier.registry import build
from luthier.storage import checkpoints


def test_lion_by_its_closed_form():
    lion = build("optimizer", {"name": "lion", "weight_decay": 0.1, "max_grad_norm": 0})
    rig, plain = Rig(transforms=lion.chain(), total=10), Rig(total=10)
    rig.chain.factor = lambda step: 1.0
    moments = {k: torch.zeros_like(p) for k, p in plain.tuner.parameters().items()}
    for _ in range(10):
        rig.go(1)
        plain.closure()
        for k, p in plain.tuner.parameters().items():
            m, decay = moments[k], 0.1 if p.ndim > 1 else 0.0
            p.data -= 0.05 * ((0.9 * m + 0.1 * p.grad).sign() + decay * p.data)
            moments[k] = 0.99 * m + 0.01 * p.grad
    assert all(
        torch.allclose(p, plain.tuner.parameters()[k], atol=1e-6) for k, p in rig.tuner.parameters().items()
    )


def test_lion_moves_every_weight_alike_and_without_memory_is_the_sign():
    rig = Rig(transforms=(build("transform", {"name": "lion", "beta1": 0.0, "beta2": 0.0}),), total=4)
    for _ in range(4):
        before = rig.tuner.tensors()
        rate = rig.chain.rate
        rig.go(1)
        for k, p in rig.tuner.parameters().items():
            assert torch.allclose(before[k] - p, rate * p.grad.sign(), atol=1e-6)
    size = lambda chain: sum(t.numel() for t in checkpoints.flatten(chain.state)[0].values())
    assert 2 * size(rig.chain) == size(Rig(transforms=(build("transform", "adam"),)).go(1).chain)
