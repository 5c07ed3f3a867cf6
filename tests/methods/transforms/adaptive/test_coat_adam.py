"""coat_adam: fp8 with and without stretching, groups of one value, training as with fp32 moments."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.rows import SUMS
from luthier.methods.transforms.adaptive.coat_adam import restored, rounded
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import build


def there_and_back(x, expand=True, size=128):
    return restored(*rounded(x, size, expand), size)


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
def test_stretching_makes_the_error_smaller(spread):
    """On what second moments look like; by more than the paper's half."""
    torch.manual_seed(0)
    v = torch.exp(spread * torch.randn(128 * 200)) * 1e-6
    error = lambda expand: float((there_and_back(v, expand) - v).square().mean())
    assert error(False) > 1.5 * error(True)


def test_a_power_of_one_is_plain_scaling():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    groups = x.view(-1, 128)
    scale = groups.abs().amax(1, keepdim=True) / 448
    want = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)
    assert torch.allclose(there_and_back(x, expand=False), want, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-4, 7e-13, 2e5])
def test_groups_of_one_value_are_exact(value):
    x = torch.full((3, 100), value)
    assert torch.allclose(there_and_back(x), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (130, 3)])
def test_any_shape_comes_back_to_a_few_percent(shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.exp(torch.randn(shape))
    x = x + 0.05 * x.sign()
    back = there_and_back(x)
    error = ((back - x) / x).abs()
    # the smallest of a group have the fewest bits
    assert back.shape == x.shape and float(error.median()) < 0.05 and float(error.max()) < 0.25
    with_zero = torch.cat([x.flatten(), torch.zeros(3)])
    assert torch.equal(there_and_back(with_zero)[-3:], torch.zeros(3))


def test_the_state_is_two_bytes_a_parameter():
    coat, W = build("transform", "coat_adam"), torch.zeros(256, 128)
    state = {}
    coat.apply({"weight": torch.randn(256, 128)}, state, ParamGroup("w", {"weight": W}), 1)
    assert sum(t.nbytes for t in state["weight"].values()) == W.numel() * (2 + 24 / 128)


def test_steps_are_adams_to_a_few_percent():
    torch.manual_seed(0)
    coat, adam = build("transform", "coat_adam"), build("transform", "adam")
    group, one, two = ParamGroup("w", {"weight": torch.zeros(64, 64)}), {}, {}
    mean = torch.randn(64, 64)
    for step in range(1, 21):
        g = mean + 0.3 * torch.randn(64, 64)
        ours = coat.apply({"weight": g}, one, group, step)["weight"]
        theirs = adam.apply({"weight": g}, two, group, step)["weight"]
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.slow
def test_a_tiny_language_model_learns_as_with_fp32_moments(base, tmp_path):
    change = {"data": SUMS[:16], "max_steps": 120, "learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    ends = []
    for name in ("adam", "coat_adam"):
        losses = luthier.tune(base | change | {"optim": ["clip", name]}, folder=tmp_path / name).losses
        assert losses[-1] < 0.7 * losses[0]
        ends.append(sum(losses[-20:]) / 20)
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
