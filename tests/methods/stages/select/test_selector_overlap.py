"""selector_overlap: overlaps of the rows that selectors take; any score goes with any rule."""

from __future__ import annotations

import pytest

from helpers.synthesis import nobody
from luthier.errors import RecipeError
from luthier.registry import build

ROWS = [
    {"id": str(k), "prompt": f"p{k}", "completions": ["x"], "a": float(k), "b": float(-k)} for k in range(20)
]


def top(column: str, n: int) -> dict:
    return {"name": "top", "by": [column], "n": n}


def stage(**settings):
    selectors = {
        "quality": {"high": [top("a", 10)], "low": [top("b", 10)]},
        "diversity": {"wide": [top("a", 15)]},
        "importance": {"few": [top("a", 15), top("b", 5)]},
    }
    return build("stage", {"name": "selector_overlap", "selectors": selectors, **settings})


def test_overlaps_are_those_of_the_rows_that_are_taken():
    roles = nobody()
    roles.stage_metrics = {}
    out = list(stage()(ROWS, roles))
    assert len(out) == len(ROWS) and not roles.dropped
    values = roles.stage_metrics
    assert values["overlap high, low"] == 0.0 and values["overlap high, wide"] == pytest.approx(10 / 15)
    assert values["overlap wide, few"] == pytest.approx(5 / 15) and values["overlap high, few"] == 0.0
    assert out[19]["selectors"] == ["high", "wide"] and out[0]["selectors"] == ["low"]
    assert "high (quality) 10" in roles.sentences[-1]
    chosen = list(stage(keep="few")(ROWS, roles))
    assert [row["id"] for row in chosen] == ["5", "6", "7", "8", "9"] and len(roles.dropped) == 15


def test_any_score_goes_with_any_rule():
    rules = {
        "best": [top("a", 4)],
        "threshold": [{"name": "top", "by": ["a"], "least": 16.0}],
        "drawn": [{"name": "top", "by": ["b"], "n": 16}, {"name": "random_rows", "n": 4}],
    }
    made = stage(selectors={"quality": rules}, keep="threshold")
    assert [row["id"] for row in made(ROWS, nobody())] == ["16", "17", "18", "19"]
    assert len(list(stage(selectors={"importance": rules}, keep="drawn")(ROWS, nobody()))) == 4


def test_what_is_refused():
    with pytest.raises(RecipeError, match="no group of selectors"):
        stage(selectors={"taste": {"x": []}})
    with pytest.raises(RecipeError, match="no selector is called"):
        stage(keep="none")
