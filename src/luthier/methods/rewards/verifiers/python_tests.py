"""The share of the row's `tests` that the code in a text passes, run in the sandbox."""

from __future__ import annotations

import ast
import warnings

from luthier.errors import RecipeError
from luthier.methods.formats._base import TESTS
from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox.code import extract_code
from luthier.sandbox.sandbox import run_many


@reward(
    requires=[TESTS],
    use_when="answers are Python functions and rows have tests.",
    costs="a sandboxed process for each completion, up to `timeout` seconds.",
)
class PythonTests(Reward):
    """`tests` is a list of assert statements, or one string of Python in which every assert counts.

    The code is the last fenced block that defines something; without fences, the whole text. Before running
    untrusted code, check what the sandbox protects from on this machine (`luthier doctor`).
    """

    all_or_nothing: bool = False  # 1 if every test passes, else 0, instead of the share
    prefix: str = ""  # column put before the code, such as prompt where the model completes a function
    timeout: float = 5.0  # maximum seconds for the code and all its tests
    memory_mb: int = 512  # memory limit of the program
    packages: bool = False  # allow the code to import installed packages; false: only the standard library

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """Between 0.0 and 1.0 per text; a text that says the same as another is run once."""
        checks = split(self.column(row, "tests"))
        before = str(self.column(row, self.prefix)) if self.prefix else ""
        if (
            not self.prefix
            and isinstance(start := row.get("prompt"), str)
            and any(continues(start, text) for text in texts)
        ):
            raise RecipeError(
                "reward 'python_tests': no answer is valid code without its prompt; set `prefix: prompt`"
            )
        programs = list(dict.fromkeys(before + extract_code(text) for text in texts))
        limits = {"timeout": self.timeout, "memory_mb": self.memory_mb, "packages": self.packages}
        results = dict(
            zip(programs, run_many({"code": p, "checks": checks, **limits} for p in programs), strict=True)
        )
        return [self.grade(results[before + extract_code(text)].passed) for text in texts]

    def grade(self, passed: tuple[bool, ...]) -> float:
        """From verdicts to a number."""
        return float(all(passed)) if self.all_or_nothing else sum(passed) / len(passed)


def continues(start: str, text: str) -> bool:
    """Is a text no Python by itself, and with its prompt before it a whole program?"""
    return not parses(text) and bool(text.strip()) and bool(start.strip()) and parses(start + text)


def parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def split(tests: str | list[str]) -> list[str]:
    """Checks to be counted. One string is cut after each statement that may check; definitions go with the
    next.
    """
    if not isinstance(tests, str):
        for test in tests:
            parse(test)
        return list(tests)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    passive = (*functions, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    checks, waiting = [], []
    for node in parse(tests).body:
        waiting.append(ast.unparse(node))
        if not isinstance(node, passive):
            checks.append("\n".join(waiting))
            waiting = []
    if not checks:
        raise RecipeError(
            "reward 'python_tests': these tests check nothing, they only define functions or"
            f" values: {tests[:80]!r}"
        )
    return checks


def parse(test: str) -> ast.Module:
    """A test as a tree; a sentence where it is not Python."""
    try:
        return ast.parse(test)
    except (SyntaxError, ValueError, TypeError) as error:
        raise RecipeError(
            f"reward 'python_tests': a row's test is not valid Python ({error}): {str(test)[:80]!r}"
        ) from None
