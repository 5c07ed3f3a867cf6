"""sgd: is torchs."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import against_torch
from luthier.registry import build


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum, nesterov):
    ours = build(
        "optimizer",
        {
            "name": "sgd",
            "weight_decay": 0.1,
            "max_grad_norm": 0.3,
            "momentum": momentum,
            "nesterov": nesterov,
        },
    )
    theirs = lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=momentum, nesterov=nesterov)
    assert against_torch(ours, theirs, clip=0.3) < 1e-6
