"""pela: products are the best of their rank; healing brings a model of low rank back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.objectives import tune_two_steps
from luthier.methods.objectives.distillation.pela import excess
from luthier.registry import build


def test_products_are_the_best_of_their_rank():
    torch.manual_seed(0)
    W, method = torch.randn(24, 40), build("tuner", {"name": "pela", "compress_ratio": 2.0})
    p = SimpleNamespace(**method.init(W))
    k = int(24 * 40 / (2.0 * (24 + 40)))
    assert p.A.shape == (k, 40) and p.B.shape == (24, k)
    left = torch.linalg.svdvals(W)[k:]
    assert float((method.weight(W, p) - W).norm()) == pytest.approx(
        float(left.square().sum().sqrt()), rel=1e-5
    )
    full = build("tuner", {"name": "pela", "compress_ratio": 1e-3})
    q = SimpleNamespace(**full.init(W))
    torch.testing.assert_close(full.weight(W, q), W, atol=1e-4, rtol=1e-4)
    gap = torch.tensor([[0.5, -0.5], [0.25, 0.0]])
    assert float(excess(gap, 0.4)) == pytest.approx((1.0 - 0.4) ** 2)


@pytest.mark.slow
@pytest.mark.long
def test_healing_brings_a_model_of_low_rank_back(tiny, tmp_path):
    whole = tune_two_steps(
        tmp_path, "whole", model=tiny, tuner="full", max_steps=40, learning_rate=3e-3
    ).folder
    common = dict(
        model=whole,
        tuner={"name": "pela", "compress_ratio": 2.0},
        roles={"teacher": "off"},
        max_steps=30,
        learning_rate=2e-3,
    )
    healed = tune_two_steps(tmp_path, "healed", objective="pela + sft", logging_steps=1, **common)
    assert healed.after["loss"] < healed.before["loss"] - 0.05 and healed.losses[-1] < healed.losses[0]
    held = tune_two_steps(
        tmp_path, "held", objective=[{"name": "pela", "perturbation": 1.0}], **{**common, "max_steps": 1}
    )
    assert held.losses[0] > 0
