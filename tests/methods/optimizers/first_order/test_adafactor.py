"""adafactor: is torch's where its rate is below its ceiling; a state of rows and columns."""

from __future__ import annotations

import torch

from helpers.optimizers import Rig, against_torch
from luthier.registry import build


def test_adafactor_is_torchs():
    settings = {"name": "adafactor", "max_grad_norm": 0, "scale_parameter": True}
    assert against_torch(build("optimizer", settings), lambda p: torch.optim.Adafactor(p, lr=0.05)) < 1e-6


def test_a_state_of_rows_and_columns():
    run = Rig(transforms=build("optimizer", "adafactor").chain()).go(1)
    state = run.chain.state["weight"]["1"]["weight"]
    assert state["rows"].shape == (6,) and state["columns"].shape == (8,)


def test_squares_of_rank_one_are_those_of_a_sign():
    """Where the squared gradient is a product of rows and columns, the first update is its sign."""
    torch.manual_seed(0)
    grad = torch.randn(5, 1) * torch.randn(1, 7)
    method = build("transform", "adafactor")
    update = method.update(grad, method.init(grad), torch.zeros(5, 7), 1)
    assert torch.allclose(update, grad.sign(), atol=1e-5)
    assert method.update(torch.zeros(5, 7), method.init(grad), torch.zeros(5, 7), 1).eq(0).all()
