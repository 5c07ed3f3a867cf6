"""Activations that transformers does not have: entries among its own, so that a network whose config names
one is built and loaded like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.compat.transformers import add_entry

CRRELU = "crrelu"


class CRReLU(nn.Module):
    """max(0, x) + eps x exp(-x^2 / 2) with one trained number eps (arXiv:2405.12954)."""

    def __init__(self, eps: float = 0.01):
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + self.eps.to(x.dtype) * x * torch.exp(-x.square() / 2)


def add_activations() -> None:
    """Let configs name the activations of this file, until no run and no model needs them."""
    from transformers.activations import ACT2FN

    table: Any = ACT2FN
    add_entry(table, CRRELU, CRReLU)
