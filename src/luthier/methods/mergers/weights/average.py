"""Model soup: the mean of each tensor over runs that started from one model. Inference costs one model.

Sums are in float64, so the average of equal tensors is that tensor bit for bit. For LoRA adapters, A and B
are averaged separately, which is the mean of their products only if one of the two is shared; full weights
have no such gap.
"""

from __future__ import annotations

import math

import torch

from luthier.errors import RecipeError
from luthier.methods.mergers._base import Merger
from luthier.registry import merger


@merger(
    paper="arXiv:2203.05482",
    row="model-soups",
    use_when="several runs started from one model and should become one model; plan `greedy_soup`"
    " chooses which.",
    costs="one pass over the tensors in float64; inference costs one model.",
)
class Average(Merger):
    """(sum of weight * tensor) / (sum of weights)."""

    weights: list[float] | None = None  # weight of each run, 0 or more; equal if not given

    def __post_init__(self):
        if self.weights is not None and not (
            self.weights and min(self.weights) >= 0 and 0 < math.fsum(self.weights) < math.inf
        ):
            raise ValueError("weights must not be negative, and not all 0")

    @torch.no_grad()
    def merge(self, several, base=None):
        names, weights = self.alike(several), self.weights or [1.0] * len(several)
        if len(weights) != len(several):
            raise RecipeError(f"merger 'average' has {len(weights)} weights for {len(several)} runs")
        out = {}
        for name in names:
            total = sum(t[name].double() * w for t, w in zip(several, weights, strict=True) if w)
            out[name] = (total / math.fsum(weights)).to(several[0][name].dtype)
        return out
