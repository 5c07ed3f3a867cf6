"""preference_losses: a table with length and tax; five losses from one file of pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers.objectives import text_roles
from helpers.plans import played
from luthier.methods.plans.studies.preference_losses import gain_at_equal_length
from luthier.registry import build
from luthier.storage import files


def tuned(folder, reward: float, tokens: float, elsewhere: float):
    before = {"generated_reward": 0.4, "generated_tokens": 10.0, "retention_loss": 1.0}
    after = {"generated_reward": reward, "generated_tokens": tokens, "retention_loss": elsewhere}
    return SimpleNamespace(folder=str(folder), before=before, after=after, stats={}, notes=[])


def test_a_table_with_length_and_tax(recipe, tmp_path):
    reports = [tuned(tmp_path / "a", 0.5, 11.0, 1.1), tuned(tmp_path / "b", 0.7, 15.0, 1.4)]
    plan = {"name": "preference_losses", "objectives": ["dpo", "ipo"]}
    asked, best = played(plan, recipe, [reports])
    assert {"name": "forgetting", "data": None} in asked[0][0].evaluate
    assert best is reports[1]
    assert [line["loss elsewhere"] for line in best.stats["table"]] == pytest.approx([0.1, 0.4])
    assert len(best.notes) == 1 and "ipo: answers are 1.50 times as long" in best.notes[0]
    own = recipe.but(evaluate=["loss", {"name": "forgetting", "n": 7, "probe": "questions.jsonl"}])
    (asked,), _ = played(plan, own, [reports])
    assert {"name": "forgetting", "n": 7, "probe": "questions.jsonl"} in asked[0].evaluate
    (asked,), _ = played({**plan, "tax": "rows.jsonl"}, own, [reports])
    assert asked[0].evaluate[-1]["data"] == "rows.jsonl" and asked[0].evaluate[-1]["n"] == 7
    (asked,), _ = played({**plan, "tax": None}, recipe, [reports])
    assert all(e != "forgetting" and e.get("name") != "forgetting" for e in asked[0].evaluate)


def answers(folder, lengths, scores):
    for when, some, marks in zip(("before", "after"), lengths, scores, strict=True):
        rows = [
            {"id": str(i), "answer": "x" * n, "score": s}
            for i, (n, s) in enumerate(zip(some, marks, strict=True))
        ]
        files.write_rows(folder / f"samples-{when}.jsonl", rows)


def test_a_gain_by_length_alone_is_none_at_equal_length(tmp_path):
    """A judge that scores length: all of the gain is length. A point more whatever the length is gained."""
    before, after = [4, 5, 6, 7], [9, 6, 12, 8]
    by_length = [[0.1 * n for n in some] for some in (before, after)]
    answers(tmp_path, (before, after), by_length)
    assert gain_at_equal_length(tmp_path) == pytest.approx(0.0, abs=1e-9)
    answers(tmp_path, (before, after), (by_length[0], [s + 1 for s in by_length[1]]))
    assert gain_at_equal_length(tmp_path) == pytest.approx(1.0)
    answers(tmp_path, ([4, 4], [4, 4]), ([0.0, 0.5], [0.5, 0.5]))
    assert gain_at_equal_length(tmp_path) == pytest.approx(0.25)
    assert gain_at_equal_length(tmp_path / "nowhere") is None


def test_pairs_differ_by_the_margin():
    rows = [
        {"id": str(i), "prompt": "p", "completions": ["a", "b", "c"], "scores": [0.1, 0.5, 0.1 + 0.1 * i]}
        for i in range(9)
    ]
    made = build("stage", {"name": "pairs", "margin": 0.45})(rows, text_roles())
    assert 0 < len(made) < len(rows)
    assert all(row["scores"][0] - row["scores"][1] > 0.45 for row in made)
