"""How good a test is that a text holds: does it parse, does it pass on the right program, and does it call
what it is to test?

0 for a text that is no test, `failing` for one that fails on the row's `solution`, `idle` for one that passes
without a call of the row's `target` (any function of the solution where there is none), 1 for one that passes
and calls it. Departs: Python in place of Java and JUnit; coverage of lines is not measured.
"""

from __future__ import annotations

import ast
from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.methods.rewards.verifiers.extract_method import called, defined
from luthier.methods.rewards.verifiers.python_tests import split
from luthier.registry import Column, reward
from luthier.sandbox.code import extract_code, tree_of
from luthier.sandbox.sandbox import kernel_walls, run_many

SOLUTION = Column(
    "solution",
    says="the right program, which tests are run on (column `solution`)",
    example=("def f(x):\n    return x\n",),
)
Part = Annotated[float, Field(ge=0, le=1)]


@reward(
    paper="arXiv:2402.11910",
    requires=[SOLUTION],
    use_when="a model writes unit tests in Python, and the program that they test is there.",
    costs="a sandboxed process for each completion, up to `timeout` seconds.",
)
class TestCase(Reward):
    """0, `failing`, `idle` or 1."""

    failing: Part = 0.25  # score of a test that fails on the right program, or checks nothing
    idle: Part = 0.5  # score of a test that passes and never calls the target
    timeout: float = 5.0  # maximum seconds for the program and the test
    memory_mb: int = 512  # memory limit of the program

    def __post_init__(self):
        if not self.failing <= self.idle:
            raise ValueError("failing: must not be above idle")
        if not kernel_walls():
            raise RecipeError(
                "reward 'test_case' runs tests that a model wrote, and this machine's kernel gives no wall"
                " around them; use Linux"
            )

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        solution = str(self.column(row, "solution"))
        tree = tree_of(solution)
        if tree is None:
            raise RecipeError(f"reward 'test_case': the solution of row {row.get('id')} is not valid Python")
        target = row.get("target")
        targets = {target} if isinstance(target, str) and target else defined(tree)
        # completions often begin with a blank, which is an indentation to Python
        programs = [extract_code(text).strip() for text in texts]
        jobs = {}
        for program in dict.fromkeys(programs):
            checks = checks_of(program)
            if checks:
                limits = {"timeout": self.timeout, "memory_mb": self.memory_mb}
                jobs[program] = {"code": solution, "checks": checks, **limits}
        results = dict(zip(jobs, run_many(jobs.values())))
        return [self.score(program, results.get(program), targets) for program in programs]

    def score(self, program: str, result, targets: set[str]) -> float:
        """One test; result: of running it, None where it checks nothing."""
        tree = tree_of(program)
        if tree is None or not tree.body:
            return 0.0
        if result is None or not all(result.passed):
            return self.failing
        return 1.0 if called(ast.Module(tree.body, [])) & targets else self.idle


def checks_of(program: str) -> list[str]:
    """What a test checks, one after another; none where it is no Python or checks nothing."""
    if tree_of(program) is None:
        return []
    try:
        return split(program)
    except RecipeError:
        return []
