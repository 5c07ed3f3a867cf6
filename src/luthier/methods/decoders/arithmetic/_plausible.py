"""The adaptive plausibility constraint of contrastive decoding."""

from __future__ import annotations

import math

from torch import Tensor


def implausible(logprobs: Tensor, alpha: float) -> Tensor:
    """[B, V] log-probabilities -> [B, V], true where p < alpha * max p of its row."""
    return logprobs < logprobs.amax(-1, keepdim=True) + math.log(alpha)
