"""Another reward on one part of a text, such as the solution behind long thoughts, which are then free.

As in BOLT: a reward model reads the solution and never the thoughts before it, so these may be of any length.
A text without the part has `otherwise`.
"""

from __future__ import annotations

from typing import Annotated, Any

from luthier.methods.rewards._base import Reward
from luthier.registry import nested, reward


@reward(
    paper="arXiv:2502.03860",
    example={"reward": "length"},
    use_when="answers have marked parts and a reward is to judge one of them: the solution, not the"
    " thoughts.",
    costs="those of its reward, which reads less.",
)
class Part(Reward):
    """The reward of what stands between <tag> and </tag>."""

    reward: Annotated[Any, nested("reward")]  # the reward that reads the part
    tag: str = "answer"  # name of the part
    otherwise: float = 0.0  # score of a text that does not have the part exactly once

    def __post_init__(self):
        if not self.tag:
            raise ValueError("tag: give the name of the part")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        parts = [self.part(text) for text in texts]
        present = [part for part in parts if part is not None]
        judged = iter(self.reward.scores(row, present) if present else ())
        return [self.otherwise if part is None else next(judged) for part in parts]

    def part(self, text: str) -> str | None:
        """What stands between the tags; None where they are not there once, in order."""
        start, end = f"<{self.tag}>", f"</{self.tag}>"
        if text.count(start) != 1 or text.count(end) != 1:
            return None
        inside, mark, _ = text.partition(start)[2].partition(end)
        return inside.strip() if mark else None
