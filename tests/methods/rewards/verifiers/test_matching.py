"""matching: letters, pairs, and credit for some of them."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build


def scores(answer: str, *texts: str, **settings) -> list[float]:
    return build("reward", {"name": "matching", **settings}).scores(
        {"id": "r", "answer": answer}, list(texts)
    )


def test_some_pairs_are_some_credit():
    right = "1-A, 2-C, 3-B, 4-D"
    texts = ["so\nAnswer: 1-A, 2-C, 3-B, 4-D", "Answer: 1–A; 2: B; 3=b", "Answer: 1-A, 1-B, 2-C", "1-A"]
    assert scores(right, *texts) == [1.0, 0.5, 0.25, 0.0]
    assert scores(right, "1-A 2-C", marker="") == [0.5]
    with pytest.raises(RecipeError, match="matches a number twice"):
        scores("1-A, 1-B", "Answer: 1-A")


def test_one_letter():
    texts = ["Answer: A\nno, Answer: B", "Answer: b.", "Answer: A", "B", "Answer:"]
    assert scores("B", *texts) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores("Б", "Answer: Б") == [1.0], "in any script"
