"""How far a fast path may lie from its plain twin before it counts as wrong."""

from __future__ import annotations

import torch
from torch import nn


def rounding(dtype: torch.dtype) -> float:
    """Of single operations: how far two right ways of rounding lie apart, absolute and relative."""
    return 1e-5 if dtype == torch.float32 else 2**-6


def logprob_tolerance(model: nn.Module) -> float:
    """Of whole networks: how far log-probabilities of two right ways of reading lie apart on average, in the
    network's precision.
    """
    dtype = next(model.parameters()).dtype
    return {torch.float32: 2e-4, torch.float16: 0.02}.get(dtype, 0.1)
