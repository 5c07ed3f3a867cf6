"""Mix-And-Match: a short prefix before the keys and values of every attention, and a scaled parallel adapter
beside every feed-forward block.

The two tuners `prefix` and `sublayer_adapter` in one. Departs: as these two; the adapter reads what the first
matrix of the feed-forward block reads, and the prefix shifts no positions.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._sublayer import SublayerAdapter
from luthier.methods.tuners.prompts._prefix import drawn, taken, width
from luthier.registry import Range, tuner


@tuner(
    example={"num_virtual_tokens": 2, "bottleneck": 4},
    paper="arXiv:2110.04366",
    provides=[DISABLE_ADAPTER],
    contract={
        "starts_as_base": "keys before the text take part in every attention from the first step on",
        "modules_of_every_kind": "its parts sit at key projections and feed-forward blocks only",
    },
    use_when="you want the paper's best mixture under one tenth of the parameters: a short prefix for"
    " attention and a wide parallel adapter for feed-forward blocks.",
    costs="as its two parts: a bottleneck beside each feed-forward block and a few more keys and values a"
    " layer; not mergeable.",
    starting_rate="the paper takes 5e-5 with a bottleneck of 512; start with that of `houlsby`.",
    default_rate=3e-4,
)
class MAM(SublayerAdapter):
    """A prefix and a scaled parallel adapter."""

    num_virtual_tokens: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 30  # keys and values, per layer
    bottleneck: Annotated[int, Field(ge=1)] | None = 512  # width of the adapter; null: by reduction_factor
    scaling: Annotated[float, Field(gt=0)] = 4.0  # what the adapter's change is multiplied by

    def ends(self):
        return (*super().ends(), "k", "qkv")

    def enter(self, model):
        taken(model, "a prefix")
        super().enter(model)

    def init(self, W):
        if self.part in ("k", "qkv"):
            return drawn(self.num_virtual_tokens, width(W.shape[0], W.shape[1], self.part))
        return super().init(W)

    def prefix_kv(self, p):
        return (p.keys, p.values) if hasattr(p, "keys") else None

    def forward(self, x, y, p, layer):
        return y if hasattr(p, "keys") else super().forward(x, y, p, layer)

    def composed(self, y, change, p):
        return y + self.scaling * change
