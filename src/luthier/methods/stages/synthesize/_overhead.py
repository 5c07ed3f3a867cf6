"""What a program costs while its tests run: time, memory over time, and which lines take it."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass

from luthier.sandbox.code import tree_of
from luthier.sandbox.sandbox import run

MARK = "overhead:"
# One process measures itself: a timer interrupts the program and notes the memory that Python holds; with
# `lines`, statements that were put between its own count how often each line runs.
HARNESS = """
import json as _json, signal as _signal, time as _time, tracemalloc as _memory
_code, _tests, _lines = _json.loads({job!r})
_points, _counts = [], {{}}
def _note(*_):
    _points.append((_time.perf_counter(), _memory.get_traced_memory()[0]))
def _hit(line):
    _counts[line] = _counts.get(line, 0) + 1
_names = {{"__name__": "program", "_hit": _hit}}
_program, _checks = compile(_code, "program", "exec"), compile(_tests, "tests", "exec")
if _lines:
    exec(_program, _names)
    exec(_checks, _names)
    print("\\n{mark}" + _json.dumps(_counts))
else:
    _memory.start()
    _signal.signal(_signal.SIGALRM, _note)
    _note()
    _signal.setitimer(_signal.ITIMER_REAL, 0.005, 0.005)
    exec(_program, _names)
    exec(_checks, _names)
    _signal.setitimer(_signal.ITIMER_REAL, 0)
    _note()
    print("\\n{mark}" + _json.dumps([_points, _memory.get_traced_memory()[1]]))
"""


@dataclass(frozen=True)
class Overhead:
    """Of one run of a program with its tests."""

    seconds: float  # ET
    peak: float  # MU, MB that Python held at most
    area: float  # TMU, MB times seconds under the curve of memory over time


def measure(code: str, tests: str, timeout: float, memory_mb: int) -> Overhead | None:
    """Runs once more, in the sandbox; None where it does not end well. What a program prints of itself is
    taken as it is: whether it is right is for a run with checks to say.
    """
    measured = harnessed(code, tests, False, timeout, memory_mb)
    if measured is None:
        return None
    points, peak = measured
    area = 0.0
    for (start, before), (end, after) in zip(points, points[1:], strict=False):
        area += (end - start) * (before + after) / 2
    return Overhead(points[-1][0] - points[0][0], peak / 2**20, area / 2**20)


def profile(code: str, tests: str, timeout: float, memory_mb: int) -> str:
    """The program with how often each line ran; as it is where it was too slow to count."""
    tree = tree_of(code)
    if tree is None:
        return code
    counted = ast.unparse(ast.fix_missing_locations(Counter().visit(tree)))
    counts = harnessed(counted, tests, True, timeout, memory_mb) or {}
    lines = []
    for number, line in enumerate(code.splitlines(), 1):
        lines.append(f"{counts.get(str(number), 0):>9} | {line}")
    return "\n".join(lines)


class Counter(ast.NodeTransformer):
    """Puts a call that counts before every statement."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                setattr(node, name, self.counted(body, isinstance(node, ast.Module)))
        return node

    def counted(self, body: list[ast.stmt], first: bool) -> list[ast.stmt]:
        """first: may the first statements be those that have to be first?"""
        out: list[ast.stmt] = []
        for statement in body:
            future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            if not (future and first):
                line = ast.Constant(statement.lineno)
                out.append(ast.Expr(ast.Call(ast.Name("_hit", ast.Load()), [line], [])))
            out.append(statement)
        return out


def harnessed(code: str, tests: str, lines: bool, timeout: float, memory_mb: int):
    """What the harness printed."""
    job = json.dumps([code, tests, lines])
    result = run(HARNESS.format(job=job, mark=MARK), timeout=timeout, memory_mb=memory_mb)
    _, mark, text = result.stdout.rpartition(MARK)
    if not result.ok or not mark:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def ratio(one: Overhead, canonical: Overhead) -> dict[str, float]:
    """Time, peak and area relative to another program's; below 1 is better."""
    return {
        "seconds": one.seconds / max(canonical.seconds, 1e-9),
        "peak": one.peak / max(canonical.peak, 1e-9),
        "area": one.area / max(canonical.area, 1e-12),
    }
