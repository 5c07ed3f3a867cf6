"""F1 of words: how many words a text shares with the row's `answer`, as in SQuAD.

Words are compared in lower case, without punctuation and articles. `answer` may be a list; the best of its
answers counts.
"""

from __future__ import annotations

import re
from collections import Counter

from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import reward


@reward(
    requires=[ANSWER],
    paper="arXiv:1606.05250",
    use_when="answers are short texts of which part may be right: extracted spans, lists, facts.",
    costs="counting words.",
)
class F1(Reward):
    """2 * shared words / (words of the text + words of the answer)."""

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        answers = self.column(row, "answer")
        if not isinstance(answers, (list, tuple)):
            answers = [answers]
        scores = []
        for text in texts:
            scores.append(max(f1(words(text), words(str(answer))) for answer in answers))
        return scores


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(one: list[str], other: list[str]) -> float:
    """Of two bags of words; 1 where both are empty."""
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))
