"""A reward that counts only where another one is high enough: style only of right answers, a judge only of
answers in the right format.
"""

from __future__ import annotations

from typing import Annotated, Any

from luthier.methods.rewards._base import Reward
from luthier.registry import nested, reward


@reward(
    example={"reward": "length", "by": "length"},
    use_when="a goal must not be bought with another one, or a costly judge should see only what passes a"
    " cheap rule.",
    costs="those of its rewards; the gated one scores only texts that pass.",
)
class Gate(Reward):
    """The reward of texts whose `by` is at least `least`, and `otherwise` for the others."""

    reward: Annotated[Any, nested("reward")]  # the reward of texts that pass
    by: Annotated[Any, nested("reward")]  # the reward that decides
    least: float = 1.0  # smallest score of `by` that passes
    otherwise: float = 0.0  # score of texts that do not pass

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        passes = [score >= self.least for score in self.by.scores(row, texts)]
        chosen = [text for text, good in zip(texts, passes, strict=True) if good]
        judged = iter(self.reward.scores(row, chosen) if chosen else ())
        return [next(judged) if good else self.otherwise for good in passes]
