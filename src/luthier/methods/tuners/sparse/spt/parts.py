"""What SPT trains in one module: some entries of its weight, a LoRA, an adapter behind it, or a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, RMSNorm
from luthier.methods.tuners.adapters._bottleneck import through
from luthier.methods.tuners.sparse._biased import Biased, BiasedEntries, Entries, in_order
from luthier.methods.tuners.sparse._sparse import some_of
from luthier.registry import family


def part_for(name: str, plan: Mapping[str, int] | None, structure: str, density: float) -> Delta:
    """The part of a module that a plan gives it: see SPT's `plan`. Without a plan, entries at random."""
    if plan is None:
        return SomeEntries(density=density)
    biases = plan.get(f"{name}.bias", 0)
    if f"{name}.weight" in plan:
        return NormEntries(n=plan[f"{name}.weight"], biases=biases)
    count = plan.get(name, 0)
    if count >= 0:
        return SomeBiasedEntries(n=count, biases=biases) if biases else SomeEntries(n=count)
    if structure == "adapter":
        return Bottleneck(r=-count, biases=biases)
    return BiasedLowRank(r=-count, biases=biases) if biases else LowRank(r=-count)


@family
class Part(Delta):
    """Family: what SPT trains in a module."""

    name: ClassVar[str] = "spt"
    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER, MERGE})
    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, nn.LayerNorm, RMSNorm)


@family
class SomeEntries(Part, Entries):
    """Some entries of a weight."""


@family
class SomeBiasedEntries(Part, BiasedEntries):
    """Some entries of a weight and of its bias."""


@family
class LowRank(Part):
    """W + B A, B zero at the start."""

    r: int  # rank

    def init(self, W):
        return {"A": torch.randn(self.r, W.shape[1]) / self.r, "B": torch.zeros(W.shape[0], self.r)}

    def weight(self, W, p):
        return W + (p.B @ p.A).to(W.dtype)

    def forward(self, x, y, p, layer):
        return y + (x @ p.A.T) @ p.B.T

    def factors(self, p):
        return p.A, p.B


@family
class BiasedLowRank(Biased, LowRank):
    """W + B A, and some entries of the bias."""

    def init(self, W):
        return super().init(W) | self.bias_tensors(W.shape[0])

    def forward(self, x, y, p, layer):
        return super().forward(x, y, p, layer) + self.change(p, y.shape[-1])


@family
class Bottleneck(Biased, Part):
    """y + up(gelu(down(y))) behind a weight's output y, `up` zero at the start."""

    provides: ClassVar[frozenset[str]] = frozenset({DISABLE_ADAPTER})

    r: int  # width

    def init(self, W):
        out = W.shape[0]
        adapter = {
            "down": torch.empty(self.r, out).uniform_(-(out**-0.5), out**-0.5),
            "down_bias": torch.zeros(self.r),
            "up": torch.zeros(out, self.r),
            "up_bias": torch.zeros(out),
        }
        return adapter | self.bias_tensors(out)

    def weight(self, W, p):
        raise NotImplementedError("an adapter behind a weight's output is no weight")

    def forward(self, x, y, p, layer):
        y = y + self.change(p, y.shape[-1])
        return y + through(y, p.down, p.down_bias, p.up, p.up_bias, "gelu")


@family
class NormEntries(Biased, Part):
    """Some entries of a norm's weight, or all, and of its bias."""

    n: int  # of the weight

    def init(self, W):
        places = torch.arange(len(W)) if self.n >= len(W) else some_of(len(W), self.n)
        weight = {"indices": in_order(places, len(W)), "values": torch.zeros(self.n)}
        return weight | self.bias_tensors(len(W))

    def weight(self, W, p):
        return W.index_add(0, p.indices.long(), p.values.to(W.dtype))

    def forward(self, x, y, p, layer):
        tensors = {"weight": self.weight(layer.weight.to(x.dtype), p)}
        if self.biases:
            bias = layer.bias.to(x.dtype)
            tensors["bias"] = bias + self.change(p, len(bias))
        return torch.func.functional_call(layer, tensors, (x,))
