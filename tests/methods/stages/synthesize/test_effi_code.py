"""effi_code: the fast program stays, never the wrong one; overhead of a program in closed form."""

from __future__ import annotations

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize._overhead import measure, profile, ratio
from luthier.registry import build

SLOW = "def total(n):\n    numbers = [k for k in range(n + 1)]\n    return sum(x for x in numbers)"
FAST = "def total(n):\n    return n * (n + 1) // 2"
WRONG = "def total(n):\n    return n * n // 2"
TESTS = ["assert total(4) == 10", "assert total(200000) == 20000100000"]
ROWS = [{"id": "0", "prompt": "Sum the numbers up to n.", "completions": [SLOW], "tests": TESTS}]
EXPECTED = "assert total(4) == 10\nassert total(3) == 7\nassert total(0) == 0"
PHASES = """
import time
one = bytearray(8 << 20)
time.sleep(0.15)
more = bytearray(16 << 20)
time.sleep(0.15)
"""


def run(rewrites, rows=ROWS, roles=None, **settings):
    """A writer that gives these rewrites in turn."""
    left = iter(rewrites)

    def script(prompt: str, seed: int) -> str:
        return f"```python\n{next(left) if prompt.startswith('Make') else SLOW}\n```"

    settings = {"solutions": 1, "timeout": 8.0, **settings}
    stage = build("stage", {"name": "effi_code", "writer": Scripted(script), **settings})
    return list(stage(rows, roles or nobody()))


@pytest.mark.long
def test_the_fast_program_stays_and_never_the_wrong_one():
    (row,) = run([FAST, WRONG])
    assert FAST in row["completions"][0] and row["rounds"] == 1 and row["tests"] == TESTS
    assert row["ratio"]["area"] < 0.5 and row["ratio"]["peak"] < 0.5
    roles = nobody()
    assert not run([WRONG], roles=roles)
    assert "1 does not pass its tests" in roles.sentences[-1] and "0" in roles.dropped


def test_the_area_of_a_program_of_two_phases():
    """8 MB and then 24 MB for as long: 16 MB on average, 24 at most."""
    cost = measure(PHASES, "pass", 8.0, 512)
    assert cost is not None and cost.seconds >= 0.3
    assert cost.area / cost.seconds == pytest.approx(16, rel=0.15) and cost.peak == pytest.approx(
        24, rel=0.02
    )
    again = measure(PHASES, "pass", 8.0, 512)
    assert again is not None and ratio(again, cost)["peak"] == pytest.approx(1.0, abs=0.02)
    assert measure("x = ", "pass", 8.0, 512) is None and measure("1 / 0", "pass", 8.0, 512) is None


def test_tests_that_most_solutions_pass_are_kept():
    """One of three tests is wrong: no solution passes it."""
    row = {"id": "0", "prompt": "Sum the numbers up to n."}
    reply = lambda prompt, seed: EXPECTED if prompt.startswith("Write assertions") else SLOW  # noqa: E731
    stage = build("stage", {"name": "effi_code", "writer": Scripted(reply), "solutions": 3})
    tests, code = stage.start(stage.author(nobody()), row, row["prompt"])
    assert tests == ["assert total(4) == 10", "assert total(0) == 0"] and code == SLOW


def test_a_profile_counts_lines():
    lines = profile(
        "def f(n):\n    for k in range(n):\n        n += 0\n    return n", "f(5)", 8.0, 512
    ).splitlines()
    assert [int(line.split("|")[0]) for line in lines] == [1, 1, 5, 1]
