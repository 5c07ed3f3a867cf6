"""Texts that a model wrote cost the process that scores them little time and memory, whatever they are."""

from __future__ import annotations

import time
import warnings

import pytest

from helpers.code import grade
from luthier.errors import RecipeError
from luthier.methods.rewards.verifiers import python_tests
from luthier.registry import build
from luthier.sandbox.code import extract_code

HOSTILE = {
    "fences": "```\n" * 200_000,
    "fences in a line": "```" * 300_000,
    "fences behind blanks": "```\n" + " ```x" * 180_000,
    "blank lines": "```\n" + "\n \t" * 300_000,
    "opening brackets": "(" * 100_000,
    "brackets": "[" * 50_000 + "]" * 50_000,
    "minus": "-" * 100_000 + "1",
    "attributes": "a" + ".a" * 50_000,
    "power": "9**9**9**9**9",
    "digits": "9" * 500_000,
    "sum": "1" + "+1" * 50_000,
    "exponent": "1e99999999999999999999",
    "latex": "$" + "\\frac{1}{" * 5_000 + "2" + "}" * 5_000 + "$",
    "boxes": "\\boxed{" * 20_000,
    "json": '{"name": ' * 20_000,
    "numbers": "1,111," * 80_000 + "1111",
    "nul": "\0" * 10_000 + "\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_read_in_no_time(name):
    start = time.perf_counter()
    extract_code(HOSTILE[name])
    python_tests.continues("def f(x):", HOSTILE[name])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.long
def test_python_tests(name):
    assert grade(HOSTILE[name], timeout=3.0) == [0.0]


@pytest.mark.parametrize("name", HOSTILE)
def test_comparisons_of_texts(name):
    row = {"answer": "12", "tools": [{"type": "function", "function": {"name": "f"}}]}
    for extract in ("none", "last_number", "after"):
        reward = build("reward", {"name": "exact_match", "extract": extract})
        assert reward.scores(row, [HOSTILE[name]]) == [0.0]
    call = {**row, "answer": '{"name": "f", "arguments": {}}'}
    assert build("reward", "tool_call").scores(call, [HOSTILE[name]]) == [-2.0]


@pytest.mark.long
def test_mathematics():
    pytest.importorskip("math_verify")
    reward = build("reward", {"name": "math", "timeout": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = reward.scores({"answer": "12"}, [*HOSTILE.values(), "$12$"])
    assert scores == [0.0] * len(HOSTILE) + [1.0]


def test_without_any_wall_of_the_kernel_programs_are_refused(monkeypatch):
    monkeypatch.setattr(python_tests, "kernel_walls", lambda: False)
    monkeypatch.setattr(python_tests, "missing_walls", lambda: "this machine has no walls")
    with pytest.raises(RecipeError, match="allow_unsandboxed"):
        build("reward", "python_tests")
    python_tests.say_once.cache_clear()
    with pytest.warns(UserWarning, match="no walls"):
        build("reward", {"name": "python_tests", "allow_unsandboxed": True})
