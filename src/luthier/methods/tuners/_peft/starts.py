"""Whether layers under a fresh adapter start as their base: tried, not declared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TRIED = 8  # layers that are tried


@torch.no_grad()
def starting_change(layers: Iterable[nn.Module]) -> float:
    """How far layers under a fresh adapter are from their base, as a share of what the base computes of
    random input; 0 where they start as it. The first `TRIED` layers tell.
    """
    largest = 0.0
    for layer in list(layers)[:TRIED]:
        x = _input(cast(Any, layer))
        if x is None:
            continue
        mode = layer.training
        layer.eval()
        with torch.random.fork_rng(devices=[]):
            tuned = layer(x)
        cast(Any, layer)._disable_adapters = True
        base = layer(x)
        cast(Any, layer)._disable_adapters = False
        layer.train(mode)
        change = (tuned - base).float().norm() / base.float().norm().clamp(min=1e-30)
        largest = max(largest, float(change))
    return largest


def _input(layer: BaseTunerLayer) -> Tensor | None:
    """Something that a layer's base can read; None where that is not known."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    if isinstance(base, nn.Embedding):
        return torch.arange(min(4, len(weight)), device=weight.device)
    if isinstance(base, Conv1D):
        width = weight.shape[0]
    elif isinstance(base, nn.Linear) or weight.ndim == 1:
        width = weight.shape[-1]
    else:
        return None
    rng = torch.Generator().manual_seed(0)
    return torch.randn(4, width, generator=rng).to(weight.device, weight.dtype)
