"""Right programs by their speed, wrong ones by how wrong they are (ACECode; PerfRL ranks programs so).

A program that passes every test has base + gain * min(t_reference / t, cap), where t is the median time of
several runs; a program as fast as the reference, or within `tolerance` of it, has base + gain. One that fails
a test, one that does not run, and a text without a program have fixed penalties, each lower than the last.
The reference is another program of the row: the one to be made faster, or a person's.

Whether a program is right is judged outside of its process; how long it takes is measured within, where a
program that means to could lie about it. The penalties are settings because the paper's exact numbers, and
its cap, could not be verified.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import median
from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import TESTS
from luthier.methods.rewards._base import Reward
from luthier.methods.rewards.verifiers.python_tests import split
from luthier.registry import Column, reward
from luthier.sandbox.code import extract_code, tree_of
from luthier.sandbox.sandbox import kernel_walls, run, run_many

REFERENCE_PROGRAM = Column(
    "reference_program",
    says="a program whose speed others are compared with (column `reference_program`)",
    example=("def f(x):\n    return x\n",),
)
TIMER = """
from time import process_time as _clock
_times = []
for _ in range({repeats}):
    _start = _clock()
    for _turn in range({turns}):
        exec(_checks, globals())
    _times.append(_clock() - _start)
print()
print("seconds", *_times)
"""


@reward(
    paper="arXiv:2412.17264",
    row="llm-interactive-code-optimization",
    requires=[TESTS, REFERENCE_PROGRAM],
    use_when="answers are Python programs that have to be right and fast.",
    costs="two or three sandboxed processes for each completion, one of which runs the tests `repeats` times"
    " `turns`.",
    covers="a rewrite counts as faster where its tests pass and its median time falls, beside a reference.",
    omits="the person who talks with a chat model, and the libraries that were made faster.",
    tests="methods/rewards/verifiers/test_efficiency.py::test_outcomes_in_their_order",
)
class Efficiency(Reward):
    """base + gain * min(t_reference / t, cap) of right programs; `failing`, `error` or `none` of others."""

    base: float = 0.5  # score of a right program, however slow
    gain: Annotated[float, Field(gt=0)] = 0.5  # times how much faster it is than the reference
    cap: Annotated[float, Field(gt=1)] = 3.0  # times faster that counts at most
    tolerance: Annotated[float, Field(ge=0)] = 0.1  # difference of times that counts as noise
    failing: float = -0.3  # a program that fails a test
    error: float = -0.6  # a program that does not run to its end
    none: float = -1.0  # no program
    repeats: Annotated[int, Field(ge=1)] = 5  # times that are measured, of which the median counts
    turns: Annotated[int, Field(ge=1)] = 20  # how often each of them runs the tests
    prefix: str = ""  # column put before the code, such as prompt where the model completes a function
    timeout: float = 5.0  # maximum seconds for the program and its tests
    memory_mb: int = 512  # memory limit of the program

    def __post_init__(self):
        if not self.none < self.error < self.failing < self.base:
            raise ValueError("none, error, failing and base must rise in this order")
        if not kernel_walls():
            raise RecipeError(
                "reward 'efficiency' runs programs that a model wrote, and this machine's kernel gives no"
                " wall around them; use Linux"
            )

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        checks = tuple(split(self.column(row, "tests")))
        before = str(self.column(row, self.prefix)) if self.prefix else ""
        programs = [before + extract_code(text) for text in texts]
        judged = {}
        for program in dict.fromkeys(programs):
            judged[program] = self.score(row, program, checks)
        return [judged[program] for program in programs]

    def score(self, row: dict, program: str, checks: tuple[str, ...]) -> float:
        """One program."""
        tree = tree_of(program)
        if tree is None or not tree.body:
            return self.none
        limits = {"timeout": self.timeout, "memory_mb": self.memory_mb}
        jobs = [{"code": program, **limits}, {"code": program, "checks": checks, **limits}]
        alone, checked = run_many(jobs)
        if not alone.ok:
            return self.error
        if not all(checked.passed):
            return self.failing
        reference = self.seconds(str(self.column(row, "reference_program")), checks)
        own = self.seconds(program, checks)
        if reference is None:
            raise RecipeError(
                f"reward 'efficiency': the reference program of row {row.get('id')} does not pass its own"
                " tests"
            )
        return self.base if own is None else self.base + self.gain * self.speed(reference, own)

    def speed(self, reference: float, own: float) -> float:
        """How many times faster than the reference, 1 within the tolerance, at most `cap`."""
        ratio = reference / max(own, 1e-9)
        if 1 / (1 + self.tolerance) <= ratio <= 1 + self.tolerance:
            return 1.0
        return min(ratio, self.cap)

    def seconds(self, program: str, checks: tuple[str, ...]) -> float | None:
        """The median time that a program takes for its checks; None where that ends in an error."""
        return _seconds(program, checks, self.repeats, self.turns, self.timeout, self.memory_mb)


@lru_cache(maxsize=4096)
def _seconds(
    program: str, checks: tuple[str, ...], repeats: int, turns: int, timeout: float, memory_mb: int
) -> float | None:
    compiled = f"_checks = compile({chr(10).join(checks)!r}, 'checks', 'exec')\n"
    timer = TIMER.format(repeats=repeats, turns=turns)
    result = run(program + "\n" + compiled + timer, timeout=timeout, memory_mb=memory_mb)
    words = result.stdout.rpartition("seconds")[2].split()
    try:
        times = [float(word) for word in words]
    except ValueError:
        times = []
    if not result.ok or len(times) != repeats or not all(map(math.isfinite, times)):
        return None
    return max(median(times), 1e-9)
