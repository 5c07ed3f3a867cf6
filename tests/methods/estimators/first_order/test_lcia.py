"""lcia: the average's weights by the formula, a constant one, and where a run ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.optimizers import Rig
from luthier.registry import build


def test_weights_of_the_average_are_those_of_the_formula():
    method = build("estimator", "lcia")
    rng = np.random.default_rng(0)
    for size in (3, 400):
        p, average, gradient, earlier = (rng.normal(size=size) * 30 for _ in range(4))
        want = (
            2 * (1 + np.abs(gradient).sum()) / (np.abs(p - average).sum() * np.abs(gradient - earlier).sum())
        )
        tensors = [torch.tensor(x) for x in (p, average, gradient, earlier)]
        assert 0 < want < 1
        assert method.weight(*tensors) == pytest.approx(want)
    small = [torch.tensor(x) for x in ([1e-3], [0.0], [0.5], [0.4])]
    assert method.weight(*small) == 0.01, "the formula says more than 1"
    same_gradient = [torch.ones(2), torch.zeros(2), torch.ones(2), torch.ones(2)]
    assert method.weight(*same_gradient) == 0.01
    assert method.weight(torch.ones(2), torch.zeros(2), torch.ones(2), None) == 0.01
    assert build("estimator", {"name": "lcia", "fallback": 0.2}).weight(*same_gradient) == 0.2


def path(estimator: dict, steps: int = 6, total: int = 7) -> tuple[list, Rig]:
    """The weights before training and after each step, and what trained them."""
    rig = Rig(estimator=estimator, total=total, learning_rate=0.3)
    points = [rig.tuner.tensors()]
    for _ in range(steps):
        rig.go(1)
        points.append(rig.tuner.tensors())
    return points, rig


def averages(rig) -> dict:
    found = {}
    for name, state in rig.chain.state.items():
        found |= {f"{name}.{slot}": average for slot, average in state["lcia averages"].items()}
    return found


def test_a_constant_weight_is_the_average_of_torch():
    """Training itself is backprop's."""
    points, rig = path({"name": "lcia", "constant": 0.25})
    plain, _ = path("backprop")
    for point, other in zip(points, plain, strict=True):
        assert all(torch.equal(p, other[name]) for name, p in point.items())
    for name, average in averages(rig).items():
        module = torch.nn.Module()
        module.p = torch.nn.Parameter(points[0][name].clone())
        ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        ema.update_parameters(module)
        for point in points[1:]:
            module.p.data.copy_(point[name])
            ema.update_parameters(module)
        assert torch.allclose(average, ema.module.p, atol=1e-6)


def test_the_end_lies_among_what_training_went_through():
    """Every number of the average lies between the least and the largest that it had; at the last step it is
    what the run ends with.
    """
    points, rig = path({"name": "lcia"})
    before = {name: average.clone() for name, average in averages(rig).items()}
    for name, average in before.items():
        every = torch.stack([point[name] for point in points])
        assert (average >= every.amin(0) - 1e-6).all() and (average <= every.amax(0) + 1e-6).all()
        assert not torch.equal(average, points[-1][name])
    rig.go(1)
    ends = rig.tuner.tensors()
    assert all(torch.equal(ends[name], average) for name, average in averages(rig).items())
    free, _ = path({"name": "lcia", "constant": 1.0}, steps=7)
    plain, _ = path("backprop", steps=7)
    assert all(torch.allclose(free[-1][name], plain[-1][name], atol=1e-6) for name in plain[-1])
