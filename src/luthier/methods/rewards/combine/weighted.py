"""A weighted sum of rewards, as one reward: where a single one is asked for (a plan, a gate, an ensemble)."""

from __future__ import annotations

from typing import Annotated, Any

from luthier.methods.rewards._base import Reward
from luthier.registry import nested_list, reward


@reward(
    example={"of": ["length", "length"]},
    use_when="one reward is to be made of several; the stage `score` sums several itself, and logs each.",
    costs="those of its rewards.",
)
class Weighted(Reward):
    """The sum of weight times score."""

    of: Annotated[Any, nested_list("reward")]  # the rewards
    weights: tuple[float, ...] | None = None  # a weight for each; null: 1

    def __post_init__(self):
        if not self.of:
            raise ValueError("of: give at least one reward")
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(f"weights: {len(self.weights)} weights for {len(self.of)} rewards")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        totals = [0.0] * len(texts)
        for weight, judge in zip(self.weights or [1.0] * len(self.of), self.of, strict=True):
            for place, score in enumerate(judge.scores(row, texts)):
                totals[place] += weight * score
        return totals
