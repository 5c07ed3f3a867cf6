"""The share of the row's `tests` that the code in a text passes, run in the sandbox."""

from __future__ import annotations

import ast
import warnings
from functools import cache

from luthier.errors import RecipeError
from luthier.methods.formats._base import TESTS
from luthier.methods.rewards._base import Reward
from luthier.registry import reward
from luthier.sandbox import limits
from luthier.sandbox.cell.judge import is_case, is_test
from luthier.sandbox.code import UNPARSABLE, extract_code, tree_of
from luthier.sandbox.code import parse as parse_code
from luthier.sandbox.sandbox import kernel_walls, missing_walls, run_many


@reward(
    requires=[TESTS],
    use_when="answers are Python functions and rows have tests.",
    costs="a sandboxed process for each completion, up to `timeout` seconds.",
)
class PythonTests(Reward):
    """`tests` is a list of assert statements, or one string of Python in which every assert counts.

    The code is the last fenced block that defines something; without fences, the whole text. Cases of
    unittest and functions `test_...` count as tests as well. Tests are judged outside the program's process,
    which gives values and never sees what is expected (docs/trust.md). On a machine whose kernel gives the
    sandbox no wall at all (`luthier doctor`), programs are refused unless `allow_unsandboxed` is set.
    """

    all_or_nothing: bool = False  # 1 if every test passes, else 0, instead of the share
    prefix: str = ""  # column put before the code, such as prompt where the model completes a function
    timeout: float = 5.0  # maximum seconds for the code and all its tests
    memory_mb: int = 512  # memory limit of the program
    packages: bool = False  # allow the code to import installed packages; false: only the standard library
    allow_unsandboxed: bool = False  # run programs on a machine without any wall of the kernel around them

    def __post_init__(self):
        if not self.allow_unsandboxed and not kernel_walls():
            raise RecipeError(
                "reward 'python_tests' runs programs that a model wrote, and this machine's kernel gives no"
                " wall around them; use Linux, or set `allow_unsandboxed: true` in a container of your own"
            )
        say_once(missing_walls())

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


@cache
def say_once(sentence: str) -> None:
    """Say what this machine's sandbox is missing, at the start of a run."""
    if sentence:
        warnings.warn(f"reward 'python_tests': {sentence}", stacklevel=4)


def continues(start: str, text: str) -> bool:
    """Is a text no Python by itself, and with its prompt before it a whole program?"""
    if len(start) + len(text) > limits.PARSED:
        return False
    if not text.strip() or not start.strip():
        return False
    return tree_of(text) is None and tree_of(start + text) is not None


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
    tree = parse(tests)
    mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    starts_itself = any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body
    )
    checks, waiting = [], []
    for node in tree.body:
        waiting.append(ast.unparse(node))
        if isinstance(node, passive) and not (runs_alone(node, mentioned) and not starts_itself):
            continue
        checks.append("\n".join(waiting))
        waiting = []
    if not checks:
        raise RecipeError(
            "reward 'python_tests': these tests check nothing, they only define functions or"
            f" values: {tests[:80]!r}"
        )
    return checks


def runs_alone(node: ast.stmt, mentioned: set[str]) -> bool:
    """Is it a case of unittest, or a test in the way of pytest, that no other statement starts?"""
    if isinstance(node, ast.ClassDef):
        return is_case(node)
    return is_test(node) and node.name not in mentioned


def parse(test: str) -> ast.Module:
    """A test as a tree; a sentence where it is not Python."""
    try:
        return parse_code(test)
    except (*UNPARSABLE, TypeError) as error:
        raise RecipeError(
            f"reward 'python_tests': a row's test is not valid Python ({error}): {str(test)[:80]!r}"
        ) from None
