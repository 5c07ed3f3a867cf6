"""add_column: a row's own text among its completions."""

from __future__ import annotations

from luthier.registry import build


def test_the_text_joins_the_completions_once():
    row = {"id": "a", "prompt": "p", "completions": [[5, 6], "own"], "scores": [1.0, 0.0], "answer": "good"}
    stage = build("stage", {"name": "add_column", "before": " "})
    (once,) = stage([row], None)
    assert once == {"id": "a", "prompt": "p", "completions": [[5, 6], "own", " good"], "answer": "good"}
    assert list(stage([once], None)) == [once]
    assert len(row["completions"]) == 2, "rows are not changed in place"
    (without,) = stage([{**row, "answer": None}], None)
    assert without["completions"] == row["completions"]
