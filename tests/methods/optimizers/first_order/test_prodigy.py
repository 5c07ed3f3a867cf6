"""prodigy: the formula step by step, and an estimate that finds the distance on a convex quadratic."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from luthier.registry import build


def minimize(start: float, minimum: torch.Tensor, steps: int, **settings):
    """x -> |x - minimum|^2 / 2 from `start` -> the point, the state and the estimates of all steps."""
    method, state = build("transform", {"name": "prodigy", **settings}), {}
    x = torch.full_like(minimum, start)
    estimates = []
    for step in range(1, steps + 1):
        group = SimpleNamespace(name="x", params={"x": x})
        x = x - method.apply({"x": x - minimum}, state, group, step)["x"]
        estimates.append(state["d"])
    return x, state, estimates


def test_two_steps_by_hand():
    g1, b1, b2, d0 = torch.tensor([1.0, -3.0]), 0.9, 0.999, 1e-6
    x1 = -d0 * (d0 * (1 - b1) * g1) / ((d0**2 * (1 - b2) * g1**2).sqrt() + d0 * 1e-8)
    own, _, estimates = minimize(0.0, -g1, 1)
    assert estimates == [d0] and torch.allclose(own, x1, rtol=1e-5, atol=0)
    g2 = x1 + g1
    numerator = float(d0 * (g2 * -x1).sum())
    s = b2**0.5 * d0 * g1 + d0 * g2
    _, _, estimates = minimize(0.0, -g1, 2)
    assert abs(estimates[1] / max(d0, numerator / float(s.abs().sum())) - 1) < 1e-4


def test_the_estimate_finds_the_distance():
    """Within a factor of ten of it, whatever its size; it never falls, nor exceeds it much."""
    for size in (0.1, 10.0):
        x, _, estimates = minimize(0.0, torch.full((4,), size), 300)
        assert size / 10 < estimates[-1] < size * 10
        assert estimates == sorted(estimates)
        assert float((x - size).abs().max()) < 0.2 * size


def test_growth_is_limited_and_decay_goes_by_the_estimate():
    _, _, estimates = minimize(0.0, torch.ones(2), 20, growth_rate=1.5)
    assert all(b <= 1.5 * a * (1 + 1e-9) or a == 1e-6 for a, b in zip(estimates, estimates[1:], strict=False))
    group = SimpleNamespace(name="w", params={"w": torch.ones(2, 2)})
    method = build("transform", {"name": "prodigy", "weight_decay": 0.5, "d0": 0.01})
    assert torch.allclose(
        method.apply({"w": torch.zeros(2, 2)}, {}, group, 1)["w"], torch.full((2, 2), 0.005)
    )
