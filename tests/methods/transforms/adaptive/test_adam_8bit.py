"""adam_8bit: the table, rounding to its nearest value, bytes of state, steps as Adam's."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.transforms.adaptive.adam_8bit import restored, rounded, table
from luthier.methods.tuners._base import ParamGroup
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.tools.foreign.training_arguments import optimizer_of


@pytest.mark.parametrize("signed", [True, False])
def test_rounds_to_the_nearest_value_of_the_table(signed):
    values = table(signed)
    assert len(values.unique()) == 256 and float(values.max()) == 1 and bool((values == 0).any())
    assert torch.equal(restored(*rounded(values, 256, signed), 256, signed), values)
    torch.manual_seed(0)
    x = torch.randn(37, 11) if signed else torch.rand(37, 11) ** 4
    back = restored(*rounded(x, 64, signed), 64, signed)
    for block, mine in zip(x.flatten().split(64), back.flatten().split(64), strict=True):
        scale = block.abs().max()
        least = (block[:, None] - values * scale).abs().amin(1)
        assert torch.allclose((block - mine).abs(), least, rtol=1e-4, atol=1e-6)


def test_zeros_stay_zero():
    for signed in (True, False):
        assert torch.equal(restored(*rounded(torch.zeros(5, 3), 4, signed), 4, signed), torch.zeros(5, 3))


def test_the_state_is_two_bytes_a_parameter():
    method, W, state = build("transform", "adam_8bit"), torch.zeros(256, 128), {}
    method.apply({"weight": torch.randn(256, 128)}, state, ParamGroup("w", {"weight": W}), 1)
    assert sum(t.nbytes for t in state["weight"].values()) == W.numel() * (2 + 8 / 256)


def test_steps_are_adams_to_a_few_percent():
    torch.manual_seed(0)
    method, adam = build("transform", "adam_8bit"), build("transform", "adam")
    group, one, two = ParamGroup("w", {"weight": torch.zeros(64, 64)}), {}, {}
    mean = torch.randn(64, 64)
    for step in range(1, 21):
        g = mean + 0.3 * torch.randn(64, 64)
        ours = method.apply({"weight": g}, one, group, step)["weight"]
        theirs = adam.apply({"weight": g}, two, group, step)["weight"]
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_the_names_of_other_tools():
    for name in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
        assert Recipe.load({"optim": name}).optim == "adamw_8bit"
        assert optimizer_of(name) == "adamw_8bit"
    assert optimizer_of("adamw_torch_4bit") == "adamw"
