"""weighted, gate, scaled: arithmetic by hand; the gated reward never sees what does not pass."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build

ROW = {"id": "r", "prompt": "x", "answer": "a b"}
LENGTH = {"name": "length"}  # words


def scores(spec, *texts):
    return build("reward", spec).scores(ROW, list(texts))


def test_sums():
    assert scores({"name": "weighted", "of": [LENGTH, "exact_match"], "weights": [0.5, 2]}, "a b", "a") == [
        3.0,
        0.5,
    ]
    assert scores({"name": "weighted", "of": [LENGTH]}, "a b c") == [3.0]
    with pytest.raises(RecipeError, match="2 weights"):
        build("reward", {"name": "weighted", "of": [LENGTH], "weights": [1, 2]})


def test_gates():
    gate = {"name": "gate", "reward": LENGTH, "by": "exact_match", "otherwise": -1.0}
    assert scores(gate, "a", "a b", "b") == [-1.0, 2.0, -1.0]
    assert scores(gate, "a") == [-1.0]


def test_scales():
    spec = {"name": "scaled", "reward": LENGTH, "mean": 2, "deviation": 2, "low": -0.25, "high": 1}
    assert scores(spec, "a", "a b c", "a b c d e f") == [-0.25, 0.5, 1.0]
    with pytest.raises(RecipeError, match="above high"):
        build("reward", {**spec, "low": 2})


def test_what_the_inner_ones_require_is_required():
    from luthier.registry import requires_of

    assert "answer" in requires_of(build("reward", {"name": "weighted", "of": [LENGTH, "exact_match"]}))
    assert "answer" in requires_of(build("reward", {"name": "gate", "reward": LENGTH, "by": "exact_match"}))
