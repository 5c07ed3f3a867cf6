"""Whether layers under a fresh adapter start as their base: tried, not declared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.tuners._peft.foreign import type_of

TRIED = 8  # layers that are tried
ROUNDING = 1e-5  # what of a layer's output rounding may change in fp32
LOW_PRECISION = 2e-2  # and in fewer bits


def start_warnings(config: Any, layers: Iterable[BaseTunerLayer]) -> tuple[str, ...]:
    """What a run with fresh layers of a type should say: that they compute something else than their base."""
    layers = [m for m in layers if not isinstance(m, ParamWrapper)]
    change = starting_change(layers)
    wide = all(p.dtype.itemsize >= 4 for m in layers for p in m.get_base_layer().parameters())
    if change <= (ROUNDING if wide else LOW_PRECISION):
        return ()
    advice = ""
    if getattr(config, "init_weights", True) is not True:
        advice = "; config: {init_weights: true} starts as the base model"
    return (
        f"type {type_of(config).lower()} does not start as the base model: before any step its layers change"
        f" what they compute by {change:.2g} of its size, so what is measured before training is not the base"
        f" model{advice}",
    )


@torch.no_grad()
def starting_change(layers: Iterable[BaseTunerLayer]) -> float:
    """How far layers under a fresh adapter are from their base, as a share of what the base computes of
    random input; 0 where they start as it. The first `TRIED` layers tell.
    """
    largest = 0.0
    for each in list(layers)[:TRIED]:
        layer, x = cast(Any, each), _input(each)
        if x is None:
            continue
        mode = layer.training
        layer.eval()
        with torch.random.fork_rng(devices=[]):
            tuned = layer(x)
        layer._disable_adapters = True
        base = layer(x)
        layer._disable_adapters = False
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
