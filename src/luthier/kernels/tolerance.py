"""How far a fast path may lie from its plain twin before it counts as wrong."""

from __future__ import annotations

import torch
from torch import nn


def rounding(dtype: torch.dtype) -> float:
    """Of single operations: how far two right ways of rounding lie apart, absolute and relative."""
    if dtype == torch.float32:
        return 1e-5
    return 2**-6


def logprob_tolerance(model: nn.Module) -> float:
    """Of whole networks: how far log-probabilities of two right ways of reading lie apart on average, in the
    network's precision.
    """
    dtype = next(model.parameters()).dtype
    if dtype == torch.float32:
        return 2e-4
    if dtype == torch.float16:
        return 0.02
    return 0.1
