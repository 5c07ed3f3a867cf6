"""requested_length: LongBench-Write's piecewise score."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build


def score(words: int, prompt: str = "Write 12 words.", **row) -> float:
    judge = build("reward", "requested_length")
    return judge.scores({"id": "r", "prompt": prompt, **row}, ["word " * words])[0]


def test_the_score_by_hand():
    assert score(12) == 100.0
    assert score(48) == pytest.approx(0.0) and score(60) == 0.0
    assert score(4) == pytest.approx(0.0) and score(3) == 0.0 and score(0) == 0.0
    assert score(24) == pytest.approx(100 * (1 - 1 / 3)) and score(6) == pytest.approx(50.0)
    assert score(18) > score(8), "longer by a half costs less than shorter by a third"


def test_the_length_is_read_from_the_prompt():
    assert score(2000, "A story of 2,000 words, please.") == 100.0
    assert score(5, "A 5-word title.") == 100.0
    assert score(7, [{"role": "user", "content": "in 7 words"}]) == 100.0
    assert score(3, "Write 12 words.", length=3) == 100.0, "a column comes first"
    assert score(3, "Write a story.") == 0.0
    with pytest.raises(RecipeError, match="needs one group"):
        build("reward", {"name": "requested_length", "pattern": "words"})
