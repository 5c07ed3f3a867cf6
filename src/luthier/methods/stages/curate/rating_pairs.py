"""Preference pairs of a judge's own judgements: one that ends in the right rating against the one whose
rating is farthest from it.

A judgement is a rationale and a rating, its last number. What is right is the row's `answer`, or, without
one, what most of its judgements say (`by: majority`). Several pairs of a row take different judgements.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import ANSWER, COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.verifiers.exact_match import NUMBER
from luthier.methods.stages._base import Stage, pick, text_of
from luthier.registry import Range, stage


@stage(
    paper="arXiv:2410.05495",
    row="self-rationalization-judge",
    requires=[COMPLETIONS],
    provides=[PAIRS, SCORES],
    contract={"gives": "the contract's rows have one completion, and a pair takes two"},
    use_when="a language model is to become a better judge by its own rationales: behind `rollout`, for"
    " `dpo`.",
    costs="nothing beside reading the ratings.",
    covers="pairs by right ratings with a margin, or by the majority's.",
    omits="a meta-judge that ranks rationales: stages `score` (reward option_judge) and `pairs` make such"
    " pairs.",
    tests=[
        "methods/stages/curate/test_rating_pairs.py::test_pairs_by_the_right_rating",
        "methods/stages/curate/test_rating_pairs.py::test_pairs_by_the_majority",
    ],
)
class RatingPairs(Stage):
    """Two completions per row and pair; `scores` are minus the distance to the right rating. Rows without a
    right judgement, or without one that is wrong by `margin`, are dropped.
    """

    by: Literal["answer", "majority"] = "answer"  # what a right rating is
    margin: Annotated[float, Field(gt=0), Range(1.0, 3.0)] = 1.0  # least distance of a rejected rating
    most: Annotated[int, Field(ge=1)] = 1  # pairs of a row at most

    @property
    def active_requires(self):
        return self.requires | {ANSWER} if self.by == "answer" else self.requires

    def __call__(self, rows, roles):
        rows, out, used = list(rows), [], []
        for place, row in enumerate(rows):
            ratings = [rating(text_of(roles, c)) for c in row["completions"]]
            pairs = self.places(ratings, self.right(row, ratings))
            if pairs:
                used.append(place)
            for k, (chosen, rejected, distance) in enumerate(pairs):
                pair = {**pick(row, [chosen, rejected]), "scores": [0.0, -distance]}
                out.append({**pair, "id": f"{row['id']}/{k}"} if k else pair)
        self.drop(roles, rows, used, "they have no right judgement beside a wrong one")
        return out

    def right(self, row: dict, ratings: list[float | None]) -> float | None:
        """The right rating; None where the majority has none."""
        if self.by == "majority":
            counts = Counter(r for r in ratings if r is not None).most_common(2)
            if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
                return None
            return counts[0][0]
        answer: Any = row["answer"][0] if isinstance(row["answer"], (list, tuple)) else row["answer"]
        right = rating(str(answer))
        if right is None:
            raise RecipeError(f"stage 'rating_pairs': the answer of row {row['id']} is no number: {answer!r}")
        return right

    def places(self, ratings: list[float | None], right: float | None) -> list[tuple[int, int, float]]:
        """Pairs of places, with the distance of the second's rating; the farthest first."""
        if right is None:
            return []
        correct, wrong = [], []
        for place, value in enumerate(ratings):
            if value == right:
                correct.append(place)
            elif value is not None and abs(value - right) >= self.margin:
                wrong.append((abs(value - right), place))
        wrong.sort(key=lambda entry: (-entry[0], entry[1]))
        pairs = []
        for chosen, (distance, rejected) in zip(correct, wrong, strict=False):
            pairs.append((chosen, rejected, distance))
        return pairs[: self.most]


def rating(text: str) -> float | None:
    """The last number of a judgement; None where it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
