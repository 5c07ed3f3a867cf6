"""How near a text comes to the length that was asked for: LongBench-Write's length score, 0 to 100.

A text of l' words where l were asked for has 100 * max(0, 1 - (l'/l - 1) / 3) if it is longer and
100 * max(0, 1 - (l/l' - 1) / 2) if it is shorter: nothing at four times and at a third of the length.
"""

from __future__ import annotations

import re

from luthier.methods.rewards._base import Reward
from luthier.registry import reward

PATTERN = r"(\d[\d,]*)[ -]?words?\b"


@reward(
    paper="arXiv:2408.07055",
    use_when="prompts say how long the answer should be, and rows or samples that are not are to be left out"
    " or scored lower.",
    costs="counting words.",
)
class RequestedLength(Reward):
    """The length is the row's number in `column`, else what `pattern` finds in its prompt."""

    column_name: str = "length"  # column that says how many words are wanted
    pattern: str = PATTERN  # where a prompt says it: a regular expression with one group
    unstated: float = 0.0  # score of rows that say no length

    def __post_init__(self):
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: no regular expression ({error})") from None
        if groups != 1:
            raise ValueError("pattern: needs one group, which is the length")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        target = self.target(row)
        if not target:
            return [self.unstated] * len(texts)
        return [length_score(len(text.split()), target) for text in texts]

    def target(self, row: dict) -> int:
        """Words that a row asks for; 0 where it does not say."""
        value = row.get(self.column_name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return max(0, int(value))
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            prompt = "\n".join(str(turn.get("content", "")) for turn in prompt if isinstance(turn, dict))
        match = re.search(self.pattern, prompt) if isinstance(prompt, str) else None
        return int(match[1].replace(",", "")) if match else 0


def length_score(words: int, target: int) -> float:
    """S_l of a text of so many words."""
    if words == 0:
        return 0.0
    if words > target:
        return 100 * max(0.0, 1 - (words / target - 1) / 3)
    return 100 * max(0.0, 1 - (target / words - 1) / 2)
