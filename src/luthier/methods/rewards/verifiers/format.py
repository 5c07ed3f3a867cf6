"""1 where a text has the parts that were asked for, each between its tags, once and in order; else 0.

As the format rewards of DeepSeek-R1 and its followers: `<think> ... </think> <answer> ... </answer>`.
"""

from __future__ import annotations

import re

from luthier.methods.rewards._base import Reward
from luthier.registry import reward


@reward(
    paper="arXiv:2501.12948",
    use_when="answers must come in marked parts, such as reasoning and answer.",
    costs="counting tags in each completion.",
)
class Format(Reward):
    """Nothing but white space may stand outside the parts, and no part may be empty."""

    tags: tuple[str, ...] = ("think", "answer")  # names of the parts, in order
    opened: bool = False  # the prompt already opens the first part, so its first tag is not in the text
    partial: bool = False  # give the share of tags that occur exactly once, instead of all or nothing

    def __post_init__(self):
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError("tags: give the name of at least one part, each once")

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """Between 0.0 and 1.0 per text."""
        return [self.score(text) for text in texts]

    def score(self, text: str) -> float:
        """One text."""
        marks = []
        for tag in self.tags:
            marks += [f"<{tag}>", f"</{tag}>"]
        if self.opened:
            if marks[0] in text:
                return 0.0
            marks = marks[1:]
        single = [text.count(mark) == 1 for mark in marks]
        if self.partial:
            return sum(single) / len(marks)
        return float(all(single) and self.in_order(text, marks))

    def in_order(self, text: str, marks: list[str]) -> bool:
        """Do all marks follow each other, with text within the parts and none outside?"""
        between = re.split("|".join(map(re.escape, marks)), text)
        if [mark for mark in re.findall("|".join(map(re.escape, marks)), text)] != marks:
            return False
        # pieces take turns: outside, inside, outside, ...; where the prompt opens, the first is inside
        inside = between[0::2] if self.opened else between[1::2]
        outside = between[1::2] if self.opened else between[0::2]
        return all(piece.strip() for piece in inside) and not any(piece.strip() for piece in outside)
