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
