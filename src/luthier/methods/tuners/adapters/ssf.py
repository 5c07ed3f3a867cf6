"""SSF: scales and shifts the output of every chosen module, y * scale + shift, with one pair of numbers per
channel.

Folds into W and b. Departs from the paper: scale starts at exactly 1 and shift at 0 (the paper draws them
from N(1, 0.02) and N(0, 0.02)), so that training starts at the base model. Modules are the linear ones unless
named: LayerNorms can be named, too; RMSNorms have no shift and are refused.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.registry import tuner


@tuner(
    paper="arXiv:2210.08823",
    row="ssf",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="you want a tiny tuner that merges away completely: a scale and a shift for each output"
    " channel.",
    costs="two trainable numbers per output channel; merged, inference costs nothing more.",
    starting_rate="several times LoRA's: its recipe here takes 0.01 where that of `lora` has 0.002.",
    default_rate=1e-3,
)
class SSF(Delta):
    """Scale and shift features: two trainable numbers per output channel."""

    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, nn.LayerNorm)

    def init(self, W):
        return {"scale": torch.ones(W.shape[0]), "shift": torch.zeros(W.shape[0])}

    def weight(self, W, p):
        return p.scale[:, None] * W if W.ndim == 2 else p.scale * W

    def bias(self, b, p):
        return p.shift if b is None else p.scale * b + p.shift

    def forward(self, x, y, p, layer):
        return y * p.scale + p.shift
