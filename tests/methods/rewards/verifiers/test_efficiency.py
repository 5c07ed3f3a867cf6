"""efficiency: outcomes in their order, speed by a stub timer, noise, and real programs in the sandbox."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.methods.rewards.verifiers.efficiency import Efficiency
from luthier.registry import build

SLOW = "def f(x):\n    s = 0\n    for i in range(x):\n        s += i\n    return s\n"
FAST = "def f(x):\n    return x * (x - 1) // 2\n"
SLOWER = SLOW.replace("s = 0", "s = 0\n    for i in range(30 * x):\n        pass")
ROW = {
    "id": "r",
    "prompt": "sum below x",
    "tests": ["assert f(0) == 0", "assert f(5000) == 12497500"],
    "reference_program": SLOW,
}


def test_outcomes_in_their_order():
    texts = ["no program (", "raise ValueError(1)", "def f(x):\n    return 0", SLOWER, SLOW, FAST]
    scores = build("reward", "efficiency").scores(ROW, texts)
    assert scores[:3] == [-1.0, -0.6, -0.3]
    assert 0.5 < scores[3] < scores[4], "right and slower"
    assert scores[4] == pytest.approx(1.0, abs=0.05), "as the reference"
    assert scores[5] == 0.5 + 0.5 * 3.0, "at the cap"
    with pytest.raises(RecipeError, match="does not pass its own tests"):
        build("reward", "efficiency").scores({**ROW, "reference_program": "def f(x): return 1"}, [FAST])


def test_the_score_rises_with_speed_up_to_the_cap(monkeypatch):
    judge = build("reward", "efficiency")
    scores = []
    for seconds in (4.0, 2.0, 1.2, 1.0, 0.8, 0.5, 0.4):
        times = {SLOW: 1.0, FAST: seconds}
        monkeypatch.setattr(Efficiency, "seconds", lambda self, program, checks, times=times: times[program])
        scores.append(judge.scores(ROW, [FAST])[0])
    assert all(a < b for a, b in zip(scores, scores[1:]))
    assert judge.speed(1.0, 0.2) == judge.speed(1.0, 0.1) == 3.0
    for noise in (0.95, 1.05):
        assert judge.speed(1.0, noise) == 1.0, "equal programs are not counted as faster"
    with pytest.raises(RecipeError, match="must rise in this order"):
        build("reward", {"name": "efficiency", "error": 0.0})
