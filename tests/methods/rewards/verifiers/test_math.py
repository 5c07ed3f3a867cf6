"""math: math; ends what never ends and goes on in any thread; says how to install what it needs."""

from __future__ import annotations

import threading

import pytest

from luthier.errors import RecipeError
from luthier.registry import build


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify")
    return build("reward", "math")


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("1/2", "The answer is 0.5", 1.0),
        ("0.5", r"so we get \boxed{\frac{1}{2}}", 1.0),
        (r"\frac{3}{4}", "$0.75$", 1.0),
        (r"x^2+2x+1", r"$\boxed{(x+1)^2}$", 1.0),
        (r"\{1, 2\}", r"$\{2,1\}$", 1.0),
        (12, r"First 7, then \boxed{12}.", 1.0),
        ("12", r"\boxed{13}", 0.0),
        ("12", "", 0.0),
        ("7", "5 7 9", 0.0),
        ("two words", "two words", 1.0),
    ],
)
def test_math(mathematics, answer, text, score):
    assert mathematics.scores({"answer": answer}, [text]) == [score]


@pytest.mark.long
def test_math_ends_what_never_ends_and_goes_on_in_any_thread(mathematics):
    quick, scores = build("reward", {"name": "math", "timeout": 1.0}), []
    texts = ["$9^{9^{9^{9}}}$", "$12$"]
    thread = threading.Thread(target=lambda: scores.extend(quick.scores({"answer": "12"}, texts)))
    thread.start()
    thread.join(30)
    assert scores == [0.0, 1.0]


def test_math_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setattr("luthier.methods.rewards.verifiers.math.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        build("reward", "math")
