"""adamw: is torchs."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import against_torch
from luthier.registry import build


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_adamw_is_torchs(clip):
    ours = build(
        "optimizer", {"name": "adamw", "weight_decay": 0.1, "max_grad_norm": clip, "adam_beta2": 0.95}
    )
    assert (
        against_torch(
            ours, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95)), clip=clip
        )
        < 1e-6
    )


def test_adam_without_bias_correction():
    """m / sqrt(v) as it is: the first step is (1 - beta1) / sqrt(1 - beta2) of the rate, not 1."""
    grads, state = [torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0])], {}
    adam = build("transform", {"name": "adam", "bias_correction": False, "adam_epsilon": 1e-6})
    param, m, v = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    state |= adam.init(param)
    for step, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        assert torch.allclose(adam.update(g, state, param, step + 1), m / (v.sqrt() + 1e-6), rtol=1e-5)
    chain = build("optimizer", {"name": "adamw", "bias_correction": False}).chain()
    assert chain[1].bias_correction is False
