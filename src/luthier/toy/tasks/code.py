"""Small Python functions from a comment, with unit tests. An item is the sequence of operations.

"fix" rows show a function with one mistake and ask for the right one; in the split "preference" the right
function is liked better than the one with the mistake. "slow" rows are loops over range(x); the splits "new"
and "new_test" ask for the same function without a loop, and `operations` measures the difference.
"""

from __future__ import annotations

import ast
import re

from ._random import Random
from ._sample import sample

SHARE = 0.1
_KINDS = {"list": 0.55, "number": 0.12, "fix": 0.21, "slow": 0.12}
_CHECKED = {"list": 0.6, "fix": 0.25, "slow": 0.15}
SPLITS = {
    "train": _KINDS,
    "validation": _CHECKED,
    "test": _CHECKED,
    "ood": {"long_list": 1},
    "new": {"faster": 1},
    "new_test": {"faster": 1},
    "preference": {"right_liked": 1},
    "preference_test": {"right_liked": 1},
}
OPERATIONS = {
    "add {k} to each": "[v + {k} for v in x]",
    "multiply each by {k}": "[v * {k} for v in x]",
    "keep those above {k}": "[v for v in x if v > {k}]",
    "keep the even ones": "[v for v in x if v % 2 == 0]",
    "keep the odd ones": "[v for v in x if v % 2 == 1]",
    "reverse the list": "x[::-1]",
    "sort the list": "sorted(x)",
    "drop the first {k}": "x[{k}:]",
    "take the first {k}": "x[:{k}]",
    "square each": "[v * v for v in x]",
    "remove duplicates": "list(dict.fromkeys(x))",
    "negate each": "[-v for v in x]",
}
RETURNS = {
    "return the list": "x",
    "return the sum": "sum(x)",
    "return the length": "len(x)",
    "return the largest": "max(x + [0])",
}
LISTS = [[3, 1, 4, 1, 5], [2, 2, 9, -4, 6, 6, 12], [8]]
NUMBERS = [0, 2, 11]


def _function(expression: str):
    """Our own expression as a function of x and k, made once: rows get their expected values without exec."""
    return eval(f"lambda x, k: {expression.replace('{k}', 'k')}")  # noqa: S307


_RUN = {words: _function(expression) for words, expression in (OPERATIONS | RETURNS).items()}


Steps = list[tuple[str, int]]  # (the words of an operation, its number)

# What a loop over i adds up, and the same as a formula.
LOOPS = {
    "add {k} for every i below x": ("{k}", "{k} * x"),
    "add {k} times i for every i below x": ("{k} * i", "{k} * (x * (x - 1) // 2)"),
    "add i plus {k} for every i below x": ("i + {k}", "x * (x - 1) // 2 + {k} * x"),
    "add {k} times i squared for every i below x": ("{k} * i * i", "{k} * (x * (x - 1) * (2 * x - 1) // 6)"),
    "add {k} minus i for every i below x": ("{k} - i", "{k} * x - x * (x - 1) // 2"),
}
_SUM = {words: _function(f"sum({term} for i in range(x))") for words, (term, _) in LOOPS.items()}
LOOP_NUMBERS = [0, 1, 7, 30]
LARGE = 10**9  # a loop as long as this takes longer than a verifier waits
MOST_OPERATIONS = 20  # of a function without a loop, whatever x


def draw(random: Random, kind: str) -> dict:
    if kind == "number":
        return _number_row(random.randint(2, 20), random.choice("+-"), random.randint(1, 50))
    if kind in ("slow", "faster"):
        return _loop_row(random.choice(list(LOOPS)), random.randint(2, 40), kind)
    count = {"long_list": (4,), "list": (1, 2, 2, 3)}.get(kind, (1, 2, 2))
    steps = [(random.choice(list(OPERATIONS)), random.randint(1, 5)) for _ in range(random.choice(count))]
    ending = random.choice(list(RETURNS))
    row = _list_row(steps, ending)
    if kind in ("list", "long_list"):
        return row
    broken = _mistake(random, steps, ending)
    if broken is None:  # no mistake of ours shows in the tests
        return draw(random, kind)
    if kind == "right_liked":
        return {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": broken,
            "tests": row["tests"],
            "item": row["item"],
        }
    return {**row, "prompt": f"{row['prompt']}{broken}\n# repaired\ndef f(x):"}


def _number_row(factor: int, sign: str, term: int) -> dict:
    words = f"multiply x by {factor}, then {'add' if sign == '+' else 'subtract'} {term}"
    tests = [f"assert f({x}) == {x * factor + (term if sign == '+' else -term)}" for x in NUMBERS]
    return _row(words, f"\n    return x * {factor} {sign} {term}", tests, words)


def _loop_row(words: str, k: int, kind: str) -> dict:
    term, formula = (text.format(k=k) for text in LOOPS[words])
    description = words.format(k=k)
    loop = f"\n    s = 0\n    for i in range(x):\n        s += {term}\n    return s"
    row = _row(
        description, loop, [f"assert f({x}) == {_SUM[words](x, k)}" for x in LOOP_NUMBERS], description
    )
    if kind == "slow":
        return row
    return {
        **row,
        "prompt": f"{row['prompt']}{loop}\n# faster\ndef f(x):",
        "completion": f"\n    return {formula}",
        "most": MOST_OPERATIONS,
    }


def _list_row(steps: Steps, ending: str) -> dict:
    words = ", then ".join([words.format(k=k) for words, k in steps] + [ending])
    tests = [f"assert f({numbers}) == {_result(steps, ending, numbers)}" for numbers in LISTS]
    item = ", ".join([words for words, _ in steps] + [ending])
    return _row(words, _body(steps, ending), tests, item)


def _body(steps: Steps, ending: str) -> str:
    lines = [f"x = {OPERATIONS[words].format(k=k)}" for words, k in steps] + [f"return {RETURNS[ending]}"]
    return "".join(f"\n    {line}" for line in lines)


def _result(steps: Steps, ending: str, numbers: list[int]):
    value = numbers
    for words, k in steps:
        value = _RUN[words](value, k)
    return _RUN[ending](value, 0)


def _mistake(random: Random, steps: Steps, ending: str) -> str | None:
    """The body with one step wrong (its number, another operation, or missing) so that a test fails; None if
    none does.
    """
    for _ in range(4):
        place = random.randrange(len(steps))
        words, k = steps[place]
        instead = random.choice(
            (
                [(words, k % 5 + 1)] if "{k}" in words else [],
                [(random.choice(list(OPERATIONS)), k)],
                [] if len(steps) > 1 else [(words, k)],
            )
        )
        broken = [*steps[:place], *instead, *steps[place + 1 :]]
        if broken and any(
            _result(broken, ending, numbers) != _result(steps, ending, numbers) for numbers in LISTS
        ):
            return _body(broken, ending)
    return None


def _row(words: str, body: str, tests: list[str], item: str) -> dict:
    return {"prompt": f"# {words}\ndef f(x):", "completion": body, "tests": tests, "item": item}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify(row: dict, answer: str) -> float:
    """The share of the row's unit tests that the function passes, run in the sandbox; half of it where a
    faster one was wanted and the loop is still there. An answer may be the body after `def f(x):`, or whole
    functions."""
    from luthier.sandbox.sandbox import run

    program = answer if "def f(" in answer else row["prompt"] + answer
    limit = row.get("most")
    if limit and re.search(r"\b_(tick|count)", answer):  # the names that count
        return 0.0
    tests = [*row["tests"], f"assert _ticks(1000) <= {limit}"] if limit else row["tests"]
    written = program
    try:
        program = counted(program) if limit else program
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    passed = run(program, timeout=5.0, memory_mb=512, checks=tests).passed
    right = sum(passed[: len(row["tests"])]) / len(row["tests"])
    if not limit:
        return right
    # the program's process counts, and could count wrongly: a loop this long it cannot hide
    last = f"assert f({LARGE}) == {_total(row['item'])(LARGE)}" if right == 1 else f"f({LARGE})"
    fast = passed[-1] and run(written, timeout=2.0, memory_mb=512, checks=[last]).passed[0]
    return right if fast else right / 2


def _total(words: str):
    """What a loop adds up below x, as a function of x, from its words."""
    for pattern, (_, formula) in LOOPS.items():
        number = re.fullmatch(re.escape(pattern).replace(r"\{k\}", r"(\d+)"), words)
        if number:
            total = _function(formula)
            return lambda x: total(x, int(number.group(1)))
    raise ValueError(f"no loop of this task: {words!r}")


class _Counted(ast.NodeTransformer):
    """Each statement, and each turn of a loop or comprehension, calls _tick()."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, (ast.FunctionDef, ast.For, ast.While)):
            node.body = [
                line for statement in node.body for line in (ast.parse("_tick()").body[0], statement)
            ]
        if isinstance(node, ast.comprehension):
            node.ifs.insert(0, ast.parse("_tick()").body[0].value)  # type: ignore[attr-defined]
        return node


def counted(program: str) -> str:
    """The same program; `_ticks(x)` there runs f(x) and says how many statements and turns of loops that
    took.

    range counts as well, so that sum(range(x)) is a loop. Raises SyntaxError where it is no Python.
    """
    return (
        "_count = [0]\n"
        "def _tick():\n    _count[0] += 1\n    return True\n"
        "def range(*given, _range=range):\n    for i in _range(*given):\n        _tick()\n        yield i\n"
        "def _ticks(x):\n    _count[0] = 0\n    f(x)\n    return _count[0]\n"
        + ast.unparse(ast.fix_missing_locations(_Counted().visit(ast.parse(program))))
    )


def operations(program: str, x) -> int:
    """How many operations f(x) takes. For programs of this task's own: written ones belong into
    the sandbox.
    """
    scope: dict = {}
    exec(counted(program), scope)  # noqa: S102
    return scope["_ticks"](x)
