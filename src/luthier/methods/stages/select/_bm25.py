"""Texts that share rare words with a question."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


class BM25:
    """Okapi BM25 over words in lower case (Robertson and Zaragoza, 2009), k1 = 1.5 and b = 0.75."""

    def __init__(self, documents: Sequence[str]):
        self.documents = list(documents)
        self.counts = [Counter(words(text)) for text in documents]
        sizes = [sum(count.values()) for count in self.counts]
        mean = sum(sizes) / max(1, len(sizes))
        self.lengths = [1.5 * (0.25 + 0.75 * size / mean) if mean else 1.5 for size in sizes]
        present = Counter(word for count in self.counts for word in count)
        total = len(self.documents)
        self.rarity = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in present.items()}

    def scores(self, query: str) -> list[float]:
        """Of each document."""
        out = []
        for count, length in zip(self.counts, self.lengths, strict=True):
            score = 0.0
            for word in words(query):
                if word in count:
                    score += self.rarity[word] * 2.5 * count[word] / (count[word] + length)
            out.append(score)
        return out

    def top(self, query: str, k: int) -> list[int]:
        """Places of the k best documents, the best first; of equal ones the earlier."""
        scores = self.scores(query)
        return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:k]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
