"""schedule_free: the three sequences written out, where a run ends, and no need of a schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.errors import RecipeError
from luthier.registry import build


def go(gradient, start: torch.Tensor, rates: list[float], **settings) -> list[torch.Tensor]:
    """The weights after each step, from `start`."""
    method = build("transform", {"name": "schedule_free", **settings}).bind(None)
    y, state, path = start.clone(), {}, []
    for i, rate in enumerate(rates):
        method.begin(rate, i + 1 == len(rates))
        group = SimpleNamespace(name="w", params={"w": y})
        y = y - rate * method.apply({"w": gradient(y)}, state, group, i + 1)["w"]
        path.append(y)
    return path


def written_out(gradient, start: torch.Tensor, rates: list[float], decay: float):
    """x, y and z as the paper has them -> y after each step, and the last x."""
    x, y, z, v = start, start, start, torch.zeros_like(start)
    weights, path = 0.0, []
    for i, rate in enumerate(rates):
        g = gradient(y)
        v = 0.999 * v + 0.001 * g * g
        z = z - rate * (g / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8) + decay * y)
        weight = max(rates[: i + 1]) ** 2
        weights += weight
        x = x + weight / weights * (z - x)
        y = 0.1 * z + 0.9 * x
        path.append(y)
    return path, x


def test_steps_are_those_of_the_three_sequences():
    """With a warmup and decay; the last step ends at the average."""
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = lambda y: torch.sin(3 * y) + y
    rates = [0.01, 0.02, 0.03, 0.03, 0.03, 0.02]
    own = go(gradient, start, rates, weight_decay=0.1)
    path, average = written_out(gradient, start, rates, 0.1)
    for ours, theirs in zip(own[:-1], path[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own[-1], average, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(average, path[-1], atol=1e-6)


def test_a_step_of_no_length_changes_nothing():
    start = torch.ones(2, 2)
    path = go(lambda y: y, start, [0.1, 0.0, 0.1, 0.1])
    assert torch.equal(path[0], path[1])
    assert all(y.isfinite().all() for y in path)
    method, group = build("transform", "schedule_free").bind(None), SimpleNamespace(params={"w": start})
    with pytest.raises(RecipeError, match="inside of another method"):
        method.apply({"w": start}, {}, group, 1)


def test_noise_is_averaged_out_at_a_constant_rate():
    """On |y|^2 / 2 under noise the end lies nearer to the minimum than where AdamW stops at the same rate."""
    draws = torch.Generator().manual_seed(1)
    noisy = lambda y: y + torch.randn(y.shape, generator=draws)
    start, rates = torch.full((16, 16), 2.0), [0.05] * 400
    averaged = go(noisy, start, rates)[-1]
    adam, y, state = build("transform", "adam"), start.clone(), {}
    for i, rate in enumerate(rates):
        group = SimpleNamespace(name="w", params={"w": y})
        y = y - rate * adam.apply({"w": noisy(y)}, state, group, i + 1)["w"]
    assert averaged.square().mean() < 0.5 * y.square().mean()
