"""A verifier's verdict, shaped by a reward model: sigmoid(alpha * model) + (verdict - 1).

As in Qwen2.5-Math: a right answer has more than 0 and a wrong one less, whatever the model says, and among
right answers, and among wrong ones, the model's order holds; so groups whose verdicts are all alike still
have something to learn.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.rewards._base import Reward
from luthier.registry import nested, reward


@reward(
    paper="arXiv:2409.12122",
    example={"reward": "length", "by": "length"},
    use_when="answers are verified, and a reward model is to rank right ones among themselves, and wrong"
    " ones.",
    costs="those of its two rewards.",
)
class Shaped(Reward):
    """Between 0 and 1 where the verifier says 1, between -1 and 0 where it says 0."""

    reward: Annotated[Any, nested("reward")]  # the reward model, or any reward
    by: Annotated[Any, nested("reward")]  # the verifier, whose scores are between 0 and 1
    alpha: Annotated[float, Field(gt=0)] = 0.5  # times the reward, inside of the sigmoid

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        shaped = []
        for score, verdict in zip(self.reward.scores(row, texts), self.by.scores(row, texts), strict=True):
            # tanh(x/2)/2 + 1/2 is the sigmoid, without an overflow
            sigmoid = 0.5 + 0.5 * math.tanh(0.5 * self.alpha * score)
            shaped.append(sigmoid + verdict - 1)
        return shaped
