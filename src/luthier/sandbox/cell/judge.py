"""The judge: runs a row's checks in a process that never ran the program.

Names that the checks do not define are the program's, by stand-ins (`remote`): calls happen in the program's
process, and values come back. Every comparison, every `in`, every function of Python's own is the judge's.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import unittest
from functools import partial
from typing import Any

from . import hook, pytest_names, remote, wire

MODULES = frozenset(
    "math cmath statistics itertools functools operator collections re json random string copy datetime "
    "decimal fractions heapq bisect time sys os unittest io contextlib typing numpy np pytest".split()
)
FULL_NAMES = {"np": "numpy"}


def main(job_file: int, verdicts: int, questions: int, answers: int) -> None:
    """Judge a job's checks; verdicts are lines of JSON."""
    with open(job_file, "rb") as file:
        job = json.loads(file.read())
    write = os.write

    def say(what: str, value: object) -> None:
        line = (json.dumps([what, value]) + "\n").encode()
        while line:
            line = line[write(verdicts, line) :]

    sys.modules.setdefault("pytest", pytest_names)  # where the real one is not installed in here
    line = remote.Line(questions, answers)
    try:
        first = wire.receive(answers)
        outcome, value = first[0], first[1]
    except (EOFError, OSError, wire.WireError, IndexError, TypeError, KeyError):
        say("ended", "")
        return
    if outcome != "ran" or not isinstance(value, dict):
        say("exit" if outcome == "exit" else "error", str(value)[:400])
        return
    if job["hook"]:
        hook.watch(os.getcwd())
    judge_checks(job["checks"], line, {str(k): str(v) for k, v in value.items()}, say)
    say("end", True)


def judge_checks(checks: list[str], line: remote.Line, kinds: dict[str, str], say) -> None:
    """Every check in turn, among the same names."""
    trees = [ast.parse(check) for check in checks]
    names = Names(line, kinds, trees)
    names["__name__"] = "__main__"
    names["__define__"] = names.define
    names["__type__"] = remote.type_of
    names["__run_case__"] = run_case
    unittest.main = partial(run_cases, names)  # type: ignore[assignment]
    for number, tree in enumerate(trees):
        prepared = ast.fix_missing_locations(prepare(tree))
        try:
            exec(compile(prepared, "<check>", "exec"), names)
        except remote.Unfinished:
            pass
        except MemoryError:
            say("error", "memory")
        except SystemExit as error:
            say("error", f"exit {error.code or 0}"[:300])
        except BaseException as error:
            say("error", sentence(error))
        else:
            if not line.broken:  # else the check swallowed the end of the program
                say("passed", number)
        if line.broken:
            say("ended", "")
            return


def sentence(error: BaseException) -> str:
    """An error as a line."""
    try:
        return f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
    except Exception:
        return type(error).__name__


# ------------------------------------------------------------------------------------------------------ names


class Names(dict):
    """The checks' names; one that they do not define is the program's, looked up each time."""

    def __init__(self, line: remote.Line, kinds: dict[str, str], trees: list[ast.Module]):
        super().__init__()
        self.line, self.kinds = line, kinds
        self["__builtins__"] = builtins
        nodes = [node for tree in trees for node in ast.walk(tree)]
        words = {node.id for node in nodes if isinstance(node, ast.Name)}
        owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        called = [node.func for node in nodes if isinstance(node, ast.Call)]
        self.modules = named(owners) & MODULES - named(called)
        # what is tested; where there is something else, a name of Python's own is not the program's
        self.tested = {word for word in words & set(kinds) - self.modules if not python_name(word)}

    def __missing__(self, name: str) -> Any:
        kind = self.kinds.get(name)
        if kind is None:
            raise KeyError(name)
        if name in self.modules or kind.startswith("module:"):
            return self.module(name, kind)
        if python_name(name) and (self.tested or kind != "own"):
            return python_value(name)
        return self.line.ask("name", name)

    def module(self, name: str, kind: str) -> Any:
        """The judge's own module, where it has it; never the program's."""
        real = FULL_NAMES.get(name, name) if name in self.modules else kind.removeprefix("module:")
        top = real.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "pandas", "scipy", "sympy", "torch"):
            return self.line.ask("name", name)
        __import__(real)
        return sys.modules[real]

    def define(self, source: str, name: str = "") -> None:
        """Imports and classes of the checks belong among the program's names as well."""
        self.line.ask("define", source)
        if name:
            self.pop(name, None)
            self.kinds[name] = "own"


def named(nodes: list[ast.expr]) -> set[str]:
    """The names among expressions."""
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def python_name(name: str) -> bool:
    """Is it a name of Python's own, which a check means unless the tested function has it?"""
    import math

    return hasattr(builtins, name) or hasattr(math, name) or name in ("approx", "raises")


def python_value(name: str) -> Any:
    """Python's own object of a name."""
    import math

    for module in (builtins, math, pytest_names):
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


# ----------------------------------------------------------------------------------------------------- checks


def prepare(tree: ast.Module) -> ast.Module:
    """A check as the judge runs it: classes of data are defined in the program's process, cases of unittest
    and functions `test_...` that nothing calls are run.
    """
    mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    runs_itself = any(isinstance(n, ast.Attribute) and n.attr == "main" for n in ast.walk(tree))
    body: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not is_case(node):
            body.append(call("__define__", ast.Constant(ast.unparse(node)), ast.Constant(node.name)))
            continue
        body.append(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            ignore = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
            mirrored = call("__define__", ast.Constant(ast.unparse(node)))
            body.append(ast.Try([mirrored], [ignore], [], []))
        elif isinstance(node, ast.ClassDef) and not runs_itself:
            body.append(call("__run_case__", ast.Name(node.name, ast.Load())))
        elif is_test(node) and node.name not in mentioned:
            body.append(call(node.name))
    tree.body = body
    return Types().visit(tree)


def call(name: str, *arguments: ast.expr) -> ast.Expr:
    """A statement that calls a function by name."""
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def is_case(node: ast.ClassDef) -> bool:
    """Is it a class of tests, which runs here?"""
    bases = [ast.unparse(base) for base in node.bases]
    return any(base.endswith("TestCase") for base in bases) or node.name.startswith("Test")


def is_test(node: ast.stmt) -> bool:
    """A function of tests in the way of pytest: nothing is passed to it."""
    if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
        return False
    return not node.args.args and not node.args.posonlyargs and not node.args.kwonlyargs


class Types(ast.NodeTransformer):
    """`type(x)` with one argument also knows the program's types."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        one = len(node.args) == 1 and not node.keywords
        if one and isinstance(node.func, ast.Name) and node.func.id == "type":
            node.func.id = "__type__"
        return node


def run_cases(names: dict, *arguments: Any, **named: Any) -> None:
    """`unittest.main()` in a check: every case among its names."""
    cases = [kind for kind in list(names.values()) if isinstance(kind, type)]
    cases = [kind for kind in cases if issubclass(kind, unittest.TestCase)]
    if not cases:
        raise AssertionError("no tests")
    for case in cases:
        run_case(case)


def run_case(case: type) -> None:
    """A class of tests: all have to pass, none may be left out."""
    if not issubclass(case, unittest.TestCase):
        run_plain_case(case)
        return
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    wrong = [*result.failures, *result.errors]
    if wrong:
        raise AssertionError(wrong[0][1].strip().rsplit("\n", 1)[-1])
    if result.skipped or result.unexpectedSuccesses or not result.testsRun:
        raise AssertionError("a test was left out")


def run_plain_case(case: type) -> None:
    """A class of tests in the way of pytest."""
    names = [name for name in dir(case) if name.startswith("test")]
    if not names:
        raise AssertionError("no tests")
    for name in names:
        test = case()
        for before in ("setup_method", "setUp"):
            if hasattr(test, before):
                getattr(test, before)()
        getattr(test, name)()
