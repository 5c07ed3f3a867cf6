"""Several rewards of the same thing as one that is hard to fool: the worst of them, or their mean less a
price for disagreement.

A policy that is optimised against one reward model finds its errors; models that were trained apart
(another seed, another order of the rows) make other errors. Their scores must be on one scale: standardise
each on a reference set (reward `scaled`, or `means` and `deviations` here).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.rewards._base import Reward
from luthier.registry import Range, nested_list, reward


@reward(
    paper="arXiv:2310.02743",
    row="rm-ensemble-conservative",
    example={"of": ["length", "length"]},
    use_when="a policy or best-of-n is optimised hard against reward models, and their errors must not be"
    " what it learns.",
    costs="those of its rewards.",
    covers="the mean, worst-case and uncertainty-weighted sums of standardised rewards; the unbiased"
    " estimate of best-of-n and its KL.",
    omits="the paper's curves at its scale; the fit of gold reward against KL.",
    tests=[
        "methods/rewards/combine/test_ensemble.py::test_modes_and_their_limits",
        "methods/rewards/combine/test_ensemble.py::test_the_estimate_of_best_of_n_is_that_over_all_subsets",
        "methods/rewards/combine/test_ensemble.py::test_an_ensemble_is_not_over_optimised",
    ],
)
class Ensemble(Reward):
    """mean, worst (the smallest score), or uncertain: mean - coefficient * variance."""

    of: Annotated[Any, nested_list("reward")]  # the rewards
    mode: Literal["mean", "worst", "uncertain"] = "worst"  # how their scores become one
    # price of the variance with `uncertain`: 0.5 for best-of-n, 0.1 for policy gradients
    coefficient: Annotated[float, Field(ge=0), Range(0.05, 1.0, log=True)] = 0.5
    means: tuple[float, ...] | None = None  # of each reward on a reference set, subtracted first
    deviations: tuple[float, ...] | None = None  # of each reward on a reference set, divided by

    def __post_init__(self):
        if not self.of:
            raise ValueError("of: give at least one reward")
        for name in ("means", "deviations"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.of):
                raise ValueError(f"{name}: {len(values)} numbers for {len(self.of)} rewards")
        if self.deviations is not None and min(self.deviations) <= 0:
            raise ValueError("deviations: must be above 0")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        means = self.means or (0.0,) * len(self.of)
        deviations = self.deviations or (1.0,) * len(self.of)
        each = []
        for judge, mean, deviation in zip(self.of, means, deviations, strict=True):
            each.append([(score - mean) / deviation for score in judge.scores(row, texts)])
        return [self.combined(list(scores)) for scores in zip(*each, strict=True)]

    def combined(self, scores: list[float]) -> float:
        """One number from the rewards of one text."""
        if self.mode == "worst":
            return min(scores)
        mean = sum(scores) / len(scores)
        if self.mode == "mean":
            return mean
        return mean - self.coefficient * sum((s - mean) ** 2 for s in scores) / len(scores)
