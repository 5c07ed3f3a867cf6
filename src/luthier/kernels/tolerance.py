"""How far a fast path may lie from its plain twin before it counts as wrong."""

from __future__ import annotations

import torch
from torch import nn

USUAL = 10.0  # nats; log-probabilities of this size are within the usual tolerance


def rounding(dtype: torch.dtype) -> float:
    """Of single operations: how far two right ways of rounding lie apart, absolute and relative."""
    if dtype == torch.float32:
        return 1e-5
    return 2**-6


def logprob_tolerance(model: nn.Module, logprobs: torch.Tensor | None = None) -> float:
    """Of whole networks: how far log-probabilities of two right ways of reading lie apart on average, in the
    network's precision. logprobs: those that are compared; rounding grows with the logits, so that of large
    ones allows more.
    """
    dtype = next(model.parameters()).dtype
    usual = 0.1
    if dtype == torch.float32:
        usual = 2e-4
    elif dtype == torch.float16:
        usual = 0.02
    return usual * magnitude(logprobs)


def magnitude(logprobs: torch.Tensor | None) -> float:
    """By how much more than usual log-probabilities may differ by rounding: in proportion to their size,
    above that of a guess among 22,000 tokens.
    """
    if logprobs is None or not len(logprobs):
        return 1.0
    return max(1.0, float(logprobs.float().abs().mean()) / USUAL)
