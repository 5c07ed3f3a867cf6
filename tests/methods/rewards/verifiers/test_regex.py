"""regex, format: patterns and parts by hand."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build


def scores(spec, *texts: str) -> list[float]:
    return build("reward", spec).scores({"id": "r", "prompt": "x"}, list(texts))


def test_patterns():
    date = {"name": "regex", "pattern": r"\d{4}-\d\d"}
    assert scores(date, "on 2024-05.", "in May", "2024-05") == [1.0, 0.0, 1.0]
    assert scores({**date, "whole": True}, "on 2024-05.", " 2024-05\n") == [0.0, 1.0]
    assert scores(
        {"name": "regex", "pattern": "sorry", "absent": True, "ignore_case": True}, "Sorry", "ok"
    ) == [0, 1]
    with pytest.raises(RecipeError, match="pattern"):
        build("reward", {"name": "regex", "pattern": "("})


def test_parts_stand_once_in_order_and_alone():
    whole = "<think>a\nb</think>\n<answer>4</answer>"
    wrong = [
        "<answer>4</answer><think>a</think>",
        whole + " and more",
        "first " + whole,
        "<think>a</think><answer> </answer>",
        "<think>a</think><think>b</think><answer>4</answer>",
        "<think>a</think><answer>4",
        "",
    ]
    assert scores("format", whole, *wrong) == [1.0] + [0.0] * len(wrong)
    opened = {"name": "format", "opened": True}
    assert scores(opened, whole.removeprefix("<think>"), whole) == [1.0, 0.0]
    assert scores({"name": "format", "partial": True}, "<think>a</think>", whole) == [0.5, 1.0]
