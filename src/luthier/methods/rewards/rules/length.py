"""Length of a text: a rule to combine with other rewards, or to test whether a judge can be
gamed by length.
"""

from __future__ import annotations

from typing import Literal

from luthier.methods.rewards._base import Reward
from luthier.registry import reward


@reward(
    use_when="length itself is a goal, such as brevity, or you test whether a judge can be gamed by it.",
    costs="counting words.",
)
class Length(Reward):
    """scale * words (or characters). A negative scale rewards brevity."""

    of: Literal["words", "characters"] = "words"  # unit that is counted
    scale: float = 1.0  # score per unit

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        return [self.scale * (len(t.split()) if self.of == "words" else len(t)) for t in texts]
