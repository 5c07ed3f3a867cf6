"""The weighted mean of low-rank changes, as products: W0 + sum of w_i * B_i A_i, where `average` would
average A and B each by itself.

The factors side by side, [w_1 B_1, w_2 B_2, ...] and [A_1; A_2; ...], are that sum exactly, at a rank that is
the sum of the ranks. `rank` says which rank the merged adapter has (that of the recipe's tuner, which then
needs an lora_alpha larger by the same factor): where it is enough, the merge is exact; else, and by default
at the runs' own rank, it is the nearest one of that rank (singular values). Octo-planner merges adapters of
several domains so; peft calls the two ways `cat` and `svd`. Tensors that are not factors are averaged.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.mergers._base import Merger
from luthier.methods.mergers.weights._deltas import weights_for
from luthier.registry import merger


@merger(
    paper="arXiv:2406.18082",
    use_when="low-rank adapters of several tasks or domains become one, without the mixed terms that come of"
    " averaging their factors.",
    costs="a singular value decomposition of small matrices for each layer; inference costs one adapter.",
)
class LowRankSum(Merger):
    """Factors `NAME.A` [r, in] and `NAME.B` [out, r] whose product is the weighted mean of the runs'."""

    weights: list[float] | None = None  # weight of each run, 0 or more; equal if not given
    rank: Annotated[int, Field(ge=1)] | None = None  # rank of the merged adapter; null: that of the runs

    def __post_init__(self):
        weights = self.weights
        if weights is not None and not (weights and min(weights) >= 0 and 0 < math.fsum(weights) < math.inf):
            raise ValueError("weights must not be negative, and not all 0")

    @torch.no_grad()
    def merge(self, several, base=None):
        names = self.alike(several)
        weights = weights_for(self, self.weights, several, 1.0)
        shares = [weight / math.fsum(weights) for weight in weights]
        out = {}
        for name in names:
            layer = name.removesuffix(".A").removesuffix(".B")
            factors = (f"{layer}.A", f"{layer}.B")
            if name not in factors or not set(factors) <= set(names):
                total = sum(t[name].double() * w for t, w in zip(several, weights) if w)
                out[name] = (total / math.fsum(weights)).to(several[0][name].dtype)
            elif name == factors[0]:
                pairs = [(t[factors[0]], t[factors[1]]) for t in several]
                merged = self.sum(layer, pairs, shares)
                out.update(zip(factors, merged))
        return {name: out[name] for name in names}

    def sum(self, layer: str, pairs: list[tuple[Tensor, Tensor]], shares: list[float]):
        """The two factors of one layer."""
        first = pairs[0]
        rank = self.rank or len(first[0])
        if len(first[0]) != first[1].shape[1]:
            raise RecipeError(f"merger '{self.name}': {layer}.A and {layer}.B are not factors of one matrix")
        chosen = [(pair, share) for pair, share in zip(pairs, shares) if share]
        alike = all(torch.equal(a, b) for (pair, _) in chosen for a, b in zip(pair, chosen[0][0]))
        if alike:  # one run, or equal ones: bit for bit
            A, B = chosen[0][0]
        else:
            A = torch.cat([pair[0].double() for pair, _ in chosen])
            B = torch.cat([pair[1].double() * share for pair, share in chosen], 1)
        if len(A) > rank:
            A, B = nearest(A.double(), B.double(), rank)
        spare = rank - len(A)
        if spare:
            A = torch.cat([A, A.new_zeros(spare, A.shape[1])])
            B = torch.cat([B, B.new_zeros(len(B), spare)], 1)
        return A.to(first[0].dtype), B.to(first[1].dtype)


def nearest(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank `rank` whose product is nearest to B A, of equal size: [rank, in] and [out, rank]."""
    left, small_left = torch.linalg.qr(B)
    right, small_right = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(small_left @ small_right.T)
    root = S[:rank].sqrt()
    return root[:, None] * (Vh[:rank] @ right.T), (left @ U[:, :rank]) * root
