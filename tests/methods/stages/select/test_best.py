"""best: what belongs to a completion goes with it; and pairs."""

from __future__ import annotations

from luthier.methods.stages._base import pick
from luthier.registry import build


def test_what_belongs_to_a_completion_goes_with_it():
    row = {
        "id": "a",
        "prompt": "p",
        "completions": ["x", "y", "z"],
        "scores": [1.0, 3.0, 2.0],
        "old_logprobs": [[0.1], [0.2], [0.3]],
        "teacher": [[1.0], [2.0], [3.0]],
        "answer": ["1", "2", "3"],
        "truncated": [True, False, True],
    }
    assert pick(row, [1, 0]) == {
        "id": "a",
        "prompt": "p",
        "completions": ["y", "x"],
        "scores": [3.0, 1.0],
        "old_logprobs": [[0.2], [0.1]],
        "teacher": [[2.0], [1.0]],
        "answer": ["1", "2", "3"],
        "truncated": [False, True],
    }


def test_best_and_pairs(roles, sentences):
    rows = [
        {"id": 0, "prompt": "", "completions": ["a", "b", "c"], "scores": [0.0, 2.0, 1.0]},
        {"id": 1, "prompt": "", "completions": ["a", "b"], "scores": [1.0, 1.0]},
        {"id": 2, "prompt": "", "completions": ["a"], "scores": [5.0]},
    ]
    best = list(build("stage", "best")(rows, roles))
    assert [(r["completions"], r["scores"]) for r in best] == [
        (["b"], [2.0]),
        (["a"], [1.0]),
        (["a"], [5.0]),
    ] and not sentences
    assert [r["id"] for r in build("stage", {"name": "best", "least": 2})(rows, roles)] == [0, 2]
    pairs = list(build("stage", "pairs")(rows, roles))
    assert [(r["id"], r["completions"], r["scores"]) for r in pairs] == [(0, ["b", "a"], [2.0, 0.0])]
    assert not list(build("stage", {"name": "pairs", "margin": 2})(rows, roles))
    assert sentences == [
        "stage 'best': 1 of 3 rows are dropped: their best score is below 2.0",
        "stage 'pairs': 2 of 3 rows are dropped: all their completions have the same score",
        "stage 'pairs': 3 of 3 rows are dropped: all their completions have the same score"
        " (they differ by 2 or less)",
    ]
