"""DARE: most of each change is dropped at random and the rest made larger, before changes are added.

An entry of a change stays with probability `density` and is divided by it, so that its mean is unchanged
(Yu et al., 2024); with `ties`, signs are elected as TIES does. Draws follow from the seed, the run's number
and the tensor.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.methods.mergers._base import BASE, Merger
from luthier.methods.mergers.weights._deltas import agreeing, weighted_sum, weights_for, with_changes
from luthier.registry import Range, merger


@merger(
    paper="arXiv:2311.03099",
    requires=[BASE],
    contract={"idempotent": "most of each change is dropped on purpose"},
    use_when="many tuned models are to become one, and their changes are redundant (small learning rates).",
    costs="one pass over the tensors in float64, and a random number for each entry.",
)
class Dare(Merger):
    """base + scale * sum of weighted changes, each dropped at random and rescaled."""

    density: Annotated[float, Field(gt=0, le=1), Range(0.05, 1.0)] = 0.3  # share of each change that stays
    weights: list[float] | None = None  # weight of each run; 1 over the number of runs if not given
    scale: float = 1.0  # of the merged change
    ties: bool = False  # are signs elected, and only agreeing changes averaged?
    draw: int = 0  # number of the draw; another one drops other entries

    def tensor_by_tensor(self):
        return True

    def merge(self, several, base=None):
        weights = weights_for(self, self.weights, several, 1.0 / max(1, len(several)))

        def combine(name, changes):
            thinned = []
            for number, change in enumerate(changes):
                rng = Clock(self.draw).rng("dare", number, name)
                stays = torch.rand(change.shape, generator=rng) < self.density
                thinned.append(change * stays.to(change.device) / self.density)
            if self.ties:
                return self.scale * agreeing(thinned, weights)
            return self.scale * weighted_sum(thinned, weights)

        return with_changes(self, several, base, combine)
