"""Preference pairs of completions that differ in score and hardly in length, so that a policy cannot win by
writing more.

Of all pairs of a row that differ enough in score and little enough in length, the one of the highest mean
score is taken: the rejected completion is then good as well, and what tells the two apart is fine.
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated

from pydantic import Field

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, pick, text_of
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2404.03862",
    row="quote-tuning",
    example={"length": 5.0},
    requires=[COMPLETIONS, SCORES],
    provides=[PAIRS],
    use_when="rows have many scored completions and a preference objective must not learn length; `pairs`"
    " takes the best and the worst, whatever their lengths.",
    costs="comparing all completions of a row with each other.",
    covers="pairs by the margin of their scores, the limit on their lengths and the highest mean score.",
    tests=["methods/stages/curate/test_equal_length_pairs.py::test_it_is_the_pair_of_a_brute_force_search"],
)
class EqualLengthPairs(Stage):
    """Two completions per row, the better first, with their scores. Rows without such a pair are dropped."""

    asks_model = False

    margin: Annotated[float, Field(ge=0)] = 0.1  # minimum difference of the two scores (exclusive)
    # maximum difference of their lengths in characters over the shorter one's (exclusive)
    length: Annotated[float, Field(gt=0), Range(0.02, 0.5)] = 0.1

    def __call__(self, rows, roles):
        rows, pairs = list(rows), []
        for row in rows:
            best = self.best(row["scores"], [len(text_of(roles, c)) for c in row["completions"]])
            if best is not None:
                pairs.append(pick(row, best))
        self.left(roles, len(rows) - len(pairs), len(rows), "no two completions differ in score alone")
        return pairs

    def best(self, scores: list[float], lengths: list[int]) -> tuple[int, int] | None:
        """Places of the better and the worse completion; of equal pairs the first."""
        best, highest = None, float("-inf")
        for i, j in permutations(range(len(scores)), 2):
            shorter = min(lengths[i], lengths[j])
            if scores[i] - scores[j] <= self.margin or shorter == 0:
                continue
            if abs(lengths[i] - lengths[j]) / shorter >= self.length:
                continue
            if scores[i] + scores[j] > highest:
                best, highest = (i, j), scores[i] + scores[j]
        return best
