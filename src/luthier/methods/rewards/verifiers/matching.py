"""Answers of school exams: one letter, or letters matched to numbers, with credit for each right pair.

`answer` is a letter ("C"), or pairs ("1-A, 2-C, 3-B, 4-D"). Of a single choice the text's last line behind
the marker must name that letter; of matched pairs the score is the share of right ones, where a text that
says two things about one number is wrong about it.
"""

from __future__ import annotations

import re

from luthier.errors import RecipeError
from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward

PAIR = re.compile(r"(\w+)\s*[-–—:=→]\s*(\w+)")


@reward(
    paper="arXiv:2503.13988",
    requires=[ANSWER],
    use_when="questions are single choice or ask to match two lists, and part of a match counts.",
    costs="reading each completion.",
)
class Matching(Reward):
    """1 for the right letter; for pairs the share that is right."""

    # the answer is the rest of the line behind the last of these; nothing: all of the text
    marker: str = "Answer:"

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        right = str(self.column(row, "answer")).strip()
        pairs = dict(PAIR.findall(right.casefold()))
        if PAIR.search(right) and len(pairs) < len(PAIR.findall(right)):
            raise RecipeError(f"reward 'matching': the answer of row {row.get('id')} matches a number twice")
        return [self.score(right, pairs, text) for text in texts]

    def score(self, right: str, pairs: dict[str, str], text: str) -> float:
        """One text."""
        if self.marker:
            _, mark, rest = text.rpartition(self.marker)
            text = (rest.strip().splitlines() or [""])[0] if mark else ""
        if not pairs:
            words = re.findall(r"\w+", text)
            return float(bool(words) and words[0].casefold() == right.casefold())
        claims: dict[str, set[str]] = {}
        for left, letter in PAIR.findall(text.casefold()):
            claims.setdefault(left, set()).add(letter)
        return sum(claims.get(left) == {letter} for left, letter in pairs.items()) / len(pairs)
