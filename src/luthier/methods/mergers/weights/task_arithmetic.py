"""Task arithmetic: the changes of several runs are added to their base model, or subtracted from it.

theta_0 + scale * sum of weight * (theta_i - theta_0) (Ilharco et al., 2023). A negative weight unlearns
what a run learned. For LoRA adapters, whose factors are multiplied, export the runs as `merged` first.
"""

from __future__ import annotations

from luthier.methods.mergers._base import BASE, Merger
from luthier.methods.mergers.weights._deltas import weighted_sum, weights_for, with_changes
from luthier.registry import merger


@merger(
    paper="arXiv:2212.04089",
    requires=[BASE],
    contract={"idempotent": "changes are added up on purpose"},
    use_when="several tasks were learned apart from one model and all are wanted, or one is to be unlearned.",
    costs="one pass over the tensors in float64; inference costs one model.",
)
class TaskArithmetic(Merger):
    """base + scale * sum of weighted changes."""

    weights: list[float] | None = None  # weight of each run; 1 if not given; negative unlearns
    scale: float = 1.0  # of the sum

    def tensor_by_tensor(self):
        return True

    def merge(self, several, base=None):
        weights = weights_for(self, self.weights, several, 1.0)

        def combine(name, changes):
            return self.scale * weighted_sum(changes, weights)

        return with_changes(self, several, base, combine)
