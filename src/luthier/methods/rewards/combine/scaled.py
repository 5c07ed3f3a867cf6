"""Another reward on another scale: standardised by a mean and a deviation, multiplied, clipped."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.rewards._base import Reward
from luthier.registry import nested, reward


@reward(
    example={"reward": "length"},
    use_when="a reward model's numbers are to be standardised on a reference set or clipped, or a"
    " reward's sign is to change.",
    costs="those of its reward.",
)
class Scaled(Reward):
    """scale * (score - mean) / deviation, between low and high."""

    reward: Annotated[Any, nested("reward")]  # the reward that is changed
    mean: float = 0.0  # subtracted first, e.g. the reward's mean on a reference set
    deviation: Annotated[float, Field(gt=0)] = 1.0  # divided by, e.g. its standard deviation there
    scale: float = 1.0  # multiplied by
    low: float | None = None  # smallest result
    high: float | None = None  # largest result

    def __post_init__(self):
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low: {self.low} is above high, {self.high}")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        scores = []
        for score in self.reward.scores(row, texts):
            score = self.scale * (score - self.mean) / self.deviation
            if self.low is not None:
                score = max(self.low, score)
            if self.high is not None:
                score = min(self.high, score)
            scores.append(score)
        return scores
