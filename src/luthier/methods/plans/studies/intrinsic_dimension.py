"""Intrinsic dimension of a task (d90): the smallest d with which tuner `intrinsic_dimension` reaches a share
of full fine-tuning's metric.

The first d whose metric reaches `share` of full fine-tuning's is the answer; its run is the plan's result,
and its recipe has d. If none does, the result is the largest d. The recipe's learning rate is for full
fine-tuning; for each d the best of `learning_rates` counts.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.plans._base import Plan, measured
from luthier.registry import plan


@plan(
    paper="arXiv:2012.13255",
    row="intrinsic-dimension",
    former_settings={"said": "structure_aware"},
    use_when="you ask how many free parameters your task takes.",
    costs="one run for each dimension and each learning rate, and one of full fine-tuning.",
)
class IntrinsicDimension(Plan):
    """The smallest d that is nearly as good as full fine-tuning."""

    # values of d, in ascending order
    dimensions: Annotated[tuple[int, ...], Field(min_length=1)] = (100, 200, 400, 800, 1600, 3200)
    # learning rates that are tried for each d
    learning_rates: Annotated[tuple[float, ...], Field(min_length=1)] = (0.03, 0.1, 0.3)
    share: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of full fine-tuning's metric to reach
    metric: str = "accuracy"  # metric that counts; higher is better
    structure_aware: bool = True  # a separate scale for each module

    def recipes(self, recipe):
        full = yield recipe.but(tuner="full")
        best = full
        for d in sorted(self.dimensions):
            tuner = {"name": "intrinsic_dimension", "d": d, "structure_aware": self.structure_aware}
            runs = yield [recipe.but(tuner=tuner, learning_rate=rate) for rate in self.learning_rates]
            best = max(runs, key=lambda run: measured(run, self.metric))
            if measured(best, self.metric) >= self.share * measured(full, self.metric):
                break
        return best
