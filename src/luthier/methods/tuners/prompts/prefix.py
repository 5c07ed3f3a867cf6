"""Prefix tuning: trains keys and values that are put before those of the text in every layer; the network
itself is frozen.

With `prefix_projection` they are the output of a small network on smaller vectors, which is how the paper
trains them. Departs: that network is one per layer, not one for all; and the positions of the text do not
shift, so a prefix has the same distance from every token and uses no context length. It is therefore an
adapter type of its own and not PEFT's PREFIX_TUNING, which counts positions from the end of the prefix.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.prompts._prefix import KEYS, drawn, placed, taken, width
from luthier.registry import Range, tuner


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2101.00190",
    provides=[DISABLE_ADAPTER],
    contract={
        "starts_as_base": "keys before the text take part in every attention from the first step on",
        "modules_of_every_kind": "it is attached to key projections and to no other module",
    },
    use_when="weights must stay untouched and rows are few, and soft prompts at the input alone (tuner"
    " `prompt`) learn too little: it trains keys and values before the text in every layer.",
    costs="`num_virtual_tokens` more keys and values a layer in every sequence; not mergeable.",
    starting_rate="above LoRA's; its recipe here was chosen on a toy model.",
    default_rate=1e-3,
)
class Prefix(Delta):
    """Keys and values before the text."""

    kinds = (nn.Linear,)
    precise = False
    part = None  # of the module that these settings are for

    # keys and values before the text, per layer
    num_virtual_tokens: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 20
    prefix_projection: bool = False  # compute them by a small network during training, as in the paper
    # width of that network; not given: that of the layer's keys
    encoder_hidden_size: Annotated[int, Field(ge=1)] | None = None
    target_modules: str | list[str] = rf".*\.({KEYS})"  # the key projections

    def at(self, name):
        return placed(self, name)

    def enter(self, model):
        taken(model, "prefix tuning")

    def init(self, W):
        if self.part not in ("k", "qkv"):
            raise ValueError(
                "a prefix is attached to key projections; leave out target_modules, or name key projections"
            )
        wide = width(W.shape[0], W.shape[1], self.part)
        tensors = drawn(self.num_virtual_tokens, wide)
        if not self.prefix_projection:
            return tensors
        hidden = self.encoder_hidden_size or wide
        first, second = nn.Linear(wide, hidden), nn.Linear(hidden, 2 * wide)
        own = {
            "vectors": torch.randn(self.num_virtual_tokens, wide),
            "first": first.weight.data,
            "first_bias": first.bias.data,
        }
        return own | {"second": second.weight.data, "second_bias": second.bias.data}

    def prefix_kv(self, p):
        if not self.prefix_projection:
            return p.keys, p.values
        both = F.linear(torch.tanh(F.linear(p.vectors, p.first, p.first_bias)), p.second, p.second_bias)
        keys, values = both.chunk(2, -1)
        return keys, values

    def forward(self, x, y, p, layer):
        return y
