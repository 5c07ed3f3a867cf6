"""sample_efficiency: rows needed by hand, and which rows runs read."""

from __future__ import annotations

import pytest

from helpers.plans import report
from luthier.errors import RecipeError
from luthier.methods.plans.studies.sample_efficiency import SampleEfficiency, rows_needed
from luthier.recipe.recipe import Recipe


def test_rows_needed_by_hand():
    assert rows_needed([1, 6, 25, 100], [10, 20, 40, 60], 30) == pytest.approx(6 + 19 / 2)
    assert rows_needed([1, 6, 25], [10, 20, 40], 40) == 25
    assert rows_needed([5, 6], [50, 60], 40) == 5
    assert rows_needed([1, 6], [10, 20], 30) is None
    assert rows_needed([1, 2, 3, 4], [1, 5, 2, 6], 4) == pytest.approx(1.75)  # the first time


def test_starts_read_the_same_rows():
    plan = SampleEfficiency(starts={"raw": {}, "tuned": {"model": "other"}}, sizes=(10, 100), metric="score")
    play = plan.recipes(Recipe.load({"model": "m", "stages": ["pairs"]}))
    arms = next(play)
    assert [arm.model for arm in arms] == ["m", "m", "other", "other"]
    assert arms[0].stages == arms[2].stages == [{"name": "random_rows", "n": 10}, "pairs"]
    with pytest.raises(StopIteration) as end:
        play.send([report(str(k), score=score) for k, score in enumerate((0.2, 0.5, 0.4, 0.6))])
    best = end.value.value
    assert best.folder == "3"
    assert best.stats["rows_needed"] == {"raw": 100, "tuned": pytest.approx(55)}
    assert [line["added"] for line in best.stats["table"]] == pytest.approx([0, 0, 0.2, 0.1])
    assert "reached with 55 rows" in best.notes[1]
    high = SampleEfficiency(sizes=(10,), reference=0.9, metric="score").recipes(Recipe.load({"model": "m"}))
    next(high)
    with pytest.raises(StopIteration) as end:
        high.send([report("a", score=0.2)])
    assert "not reached" in end.value.value.notes[0]
    with pytest.raises(RecipeError, match="ascending"):
        SampleEfficiency(sizes=(10, 5))
