"""weighted, gate, scaled: arithmetic by hand; the gated reward never sees what does not pass."""

from __future__ import annotations

from statistics import harmonic_mean

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


def test_harmonic_means():
    """The ends are one reward alone; in the middle it is the harmonic mean."""
    part = {"name": "scaled", "reward": LENGTH, "deviation": 10}  # words / 10
    for share, expected in ((0.0, [1.0, 0.0]), (1.0, [0.2, 0.1]), (0.5, [harmonic_mean([0.2, 1]), 0.0])):
        weights = [share, 1 - share]
        spec = {"name": "harmonic", "of": [part, "exact_match"], "weights": weights}
        assert scores(spec, "a b", "b") == pytest.approx(expected)
    assert scores({"name": "harmonic", "of": [part, part]}, "a b") == pytest.approx([0.2])
    with pytest.raises(ValueError, match="gives -1"):
        scores({"name": "harmonic", "of": [{**part, "mean": 11}]}, "a")
    with pytest.raises(RecipeError, match="above zero"):
        build("reward", {"name": "harmonic", "of": [part], "weights": [0]})


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


def test_a_part_alone_is_read():
    part = {"name": "part", "tag": "answer", "reward": LENGTH, "otherwise": -5.0}
    thoughts = ("short", "a much longer thought, said twice, said twice")
    texts = [f"<think>{thought}</think><answer>x y</answer>" for thought in thoughts]
    assert scores(part, *texts) == [2.0, 2.0], "other thoughts, the same reward"
    wrong = ["no tags", "<answer>x", "</answer>x<answer>", "<answer>x</answer><answer>y</answer>"]
    assert scores(part, *wrong) == [-5.0] * 4


def test_shaped_verdicts_never_cross():
    class Extreme:
        def scores(self, row, texts):
            return [float(text.split()[0]) for text in texts]

    judge = build("reward", {"name": "shaped", "reward": LENGTH, "by": LENGTH, "alpha": 0.5})
    verdict = type("Verdict", (), {"scores": lambda self, row, texts: [float(t.split()[1]) for t in texts]})
    object.__setattr__(judge, "reward", Extreme())
    object.__setattr__(judge, "by", verdict())
    wrong = judge.scores(ROW, [f"{x} 0" for x in (-60, -1, 0, 1, 60)])
    right = judge.scores(ROW, [f"{x} 1" for x in (-60, -1, 0, 1, 60)])
    assert max(wrong) <= 0 <= min(right) and wrong[2] == -0.5 and right[2] == 0.5
    assert max(wrong[:4]) < min(right[1:]), "any that a model says within reason"
    assert wrong == sorted(wrong) and right == sorted(right)
    assert judge.scores(ROW, ["2 1"]) == [pytest.approx(1 / (1 + 2.718281828 ** (-0.5 * 2)))]
    assert judge.scores(ROW, ["-1e9 1", "1e9 0"]) == [0.0, 0.0], "no overflow"
