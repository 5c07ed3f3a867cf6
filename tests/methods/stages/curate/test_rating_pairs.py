"""rating_pairs: right judgements against the ones farthest from right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.errors import RecipeError
from luthier.methods.stages.curate.rating_pairs import rating
from luthier.registry import build

JUDGEMENTS = ["clear: 4", "weak, of 5 points: 2", "bad: 1", "fine: 4", "no rating", "good: 3", "poor: 1"]


def pairs(row: dict, **settings) -> list[dict]:
    roles = SimpleNamespace(clock=SimpleNamespace(step=0, first=0), warn=lambda sentence: None, dropped={})
    return build("stage", {"name": "rating_pairs", **settings})([{"id": "r", "prompt": "?", **row}], roles)


def test_pairs_by_the_right_rating():
    (pair,) = pairs({"completions": JUDGEMENTS, "answer": 4})
    assert pair["completions"] == ["clear: 4", "bad: 1"] and pair["scores"] == [0.0, -3.0]
    two = pairs({"completions": JUDGEMENTS, "answer": "4"}, most=5)
    assert [p["completions"][1] for p in two] == ["bad: 1", "poor: 1"]
    assert len({p["id"] for p in two}) == len({p["completions"][0] for p in two}) == 2
    for margin in (1.0, 2.0, 3.0):
        for pair in pairs({"completions": JUDGEMENTS, "answer": 4}, most=5, margin=margin):
            chosen, rejected = map(rating, pair["completions"])
            assert chosen == 4 and abs(rejected - 4) >= margin
    assert not pairs({"completions": JUDGEMENTS, "answer": 4}, margin=3.5)
    assert not pairs({"completions": ["a 4", "b 4"], "answer": 4})
    assert not pairs({"completions": ["a 4", "b 3"], "answer": 5})
    with pytest.raises(RecipeError, match="no number"):
        pairs({"completions": JUDGEMENTS, "answer": "good"})


def test_pairs_by_the_majority():
    (pair,) = pairs({"completions": ["a 2", "b 5", "c 2", "d 3"]}, by="majority")
    assert pair["completions"] == ["a 2", "b 5"]
    assert not pairs({"completions": ["a 2", "b 5"]}, by="majority")  # nobody has more
