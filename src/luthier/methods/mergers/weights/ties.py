"""TIES: small changes are trimmed, a sign is elected at each entry, and what agrees with it is averaged.

Of each run's change to a tensor the largest share `density` by magnitude stays; the sign of the weighted
sum is elected; the weighted mean of the agreeing changes, times `scale`, is added to the base (Yadav et
al., 2023). Departs: trimmed tensor by tensor, as mergekit does, not over the whole model.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.mergers._base import BASE, Merger
from luthier.methods.mergers.weights._deltas import agreeing, largest, weights_for, with_changes
from luthier.registry import Range, merger


@merger(
    paper="arXiv:2306.01708",
    requires=[BASE],
    contract={"idempotent": "small changes are trimmed on purpose"},
    use_when="the changes of several runs interfere when they are added or averaged.",
    costs="one pass over the tensors in float64, with a sort of each; inference costs one model.",
)
class Ties(Merger):
    """base + scale * the mean of trimmed changes that agree in sign."""

    density: Annotated[float, Field(gt=0, le=1), Range(0.1, 1.0)] = 0.2  # share of each change that stays
    weights: list[float] | None = None  # weight of each run; 1 if not given
    scale: Annotated[float, Range(0.3, 1.5)] = 1.0  # of the merged change

    def tensor_by_tensor(self):
        return True

    def merge(self, several, base=None):
        weights = weights_for(self, self.weights, several, 1.0)

        def combine(name, changes):
            trimmed = [largest(change, round(self.density * change.numel())) for change in changes]
            return self.scale * agreeing(trimmed, weights)

        return with_changes(self, several, base, combine)
