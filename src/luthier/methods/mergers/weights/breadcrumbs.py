"""Model breadcrumbs: of each change the smallest entries and the few largest are left out, and the rest is
added.

Tensor by tensor, entries whose magnitude lies between the quantiles `beta` and `gamma` stay (Davari and
Belilovsky, 2024): the smallest are noise, the largest disturb other tasks. One set of values serves as
tasks are added. With `ties`, signs are elected as TIES does.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.mergers._base import BASE, Merger
from luthier.methods.mergers.weights._deltas import agreeing, weighted_sum, weights_for, with_changes
from luthier.registry import Range, merger


@merger(
    paper="arXiv:2312.06795",
    row="model-breadcrumbs",
    requires=[BASE],
    contract={"idempotent": "changes are trimmed and scaled on purpose"},
    use_when="more and more tasks are to be merged into one model, without new settings for each.",
    costs="one pass over the tensors in float64, with a sort of each; inference costs one model.",
    covers="both tails of each tensor's change, the scale, and signs as in TIES.",
    tests=[
        "methods/mergers/weights/test_changes.py::test_breadcrumbs_leave_out_both_tails",
        "methods/mergers/weights/test_changes.py::test_what_reduces_to_task_arithmetic",
    ],
)
class Breadcrumbs(Merger):
    """base + alpha * sum of changes without their tails."""

    alpha: Annotated[float, Range(0.1, 1.0)] = 0.3  # of the sum
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.85  # share of the smallest entries that is left out
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.993  # share above which the largest are left out
    weights: list[float] | None = None  # weight of each run; 1 if not given
    ties: bool = False  # are signs elected, and only agreeing changes averaged?

    def __post_init__(self):
        if self.gamma <= self.beta:
            raise ValueError("gamma must be above beta")

    def tensor_by_tensor(self):
        return True

    def merge(self, several, base=None):
        weights = weights_for(self, self.weights, several, 1.0)

        def combine(name, changes):
            middle = [self.without_tails(change) for change in changes]
            if self.ties:
                return self.alpha * agreeing(middle, weights)
            return self.alpha * weighted_sum(middle, weights)

        return with_changes(self, several, base, combine)

    def without_tails(self, change: torch.Tensor) -> torch.Tensor:
        """The change, with the entries outside the two quantiles at 0."""
        count = change.numel()
        first = round(self.beta * count)
        last = min(count, first + round((self.gamma - self.beta) * count))
        order = change.abs().flatten().argsort()
        mask = torch.zeros(count, dtype=change.dtype, device=change.device)
        mask[order[first:last]] = 1
        return change * mask.view_as(change)
