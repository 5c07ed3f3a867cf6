"""exact_match: exact match; a row without its column is refused."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build


@pytest.mark.parametrize(
    ("settings", "answer", "text", "score"),
    [
        ({}, "Paris", " Paris\n", 1.0),
        ({}, "Paris", "paris", 0.0),
        ({"ignore_case": True}, "Paris", "PARIS", 1.0),
        ({"ignore_punctuation": True}, "Paris", "Paris.", 1.0),
        ({"ignore_space": False}, "a b", "a  b", 0.0),
        ({}, ["two", "2"], "2", 1.0),
        ({"extract": "last_number"}, "1,234", "so 17 and then 1234.0 apples.", 1.0),
        ({"extract": "last_number"}, 5, "3-5", 1.0),
        ({"extract": "last_number"}, -5, "it is -5", 1.0),
        ({"extract": "last_number"}, 5, "no idea", 0.0),
        ({"extract": "last_number"}, "none", "none", 0.0),
        ({"extract": "after"}, "3*4=12\n#### 12", "I think\n#### 12\nbye", 1.0),
        ({"extract": "after", "marker": "=>"}, 12, "3*4=12; => 12", 1.0),
        ({"extract": "after", "marker": "=>"}, 12, "=> 12; no: => 13", 0.0),
        ({"extract": "after"}, "12", "12", 0.0),
    ],
)
def test_exact_match(settings, answer, text, score):
    assert build("reward", {"name": "exact_match", **settings}).scores({"answer": answer}, [text]) == [score]


@pytest.mark.parametrize(("name", "column"), [("exact_match", "answer"), ("python_tests", "tests")])
def test_a_row_without_its_column_is_refused(name, column):
    with pytest.raises(RecipeError, match=column):
        build("reward", name).scores({"prompt": "?"}, ["!"])
