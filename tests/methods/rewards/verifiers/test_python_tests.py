"""python_tests: code that needs its prompt is told so; right half right and wrong code; one string of tests
counts every assert; code that completes a prompt.
"""

from __future__ import annotations

import pytest

from helpers.code import grade
from luthier.errors import RecipeError

ADD = "def add(a, b):\n    return a + b\n"


def test_code_that_needs_its_prompt_is_told_so():
    row, body = {"prompt": "def f(x):"}, "\n    return x + 1"
    with pytest.raises(RecipeError, match="prefix: prompt"):
        grade(body, tests=["assert f(1) == 2"], row=row)
    assert grade(body, "\n    return x", tests=["assert f(1) == 2"], row=row, prefix="prompt") == [1.0, 0.0]
    assert grade("no code (", tests=["assert f(1) == 2"], row=row) == [0.0]  # wrong either way


def test_right_half_right_and_wrong_code():
    half = "def add(a, b):\n    return 3"
    fenced = f"Sure!\n```python\n{ADD}```\nUse it:\n```python\nprint(add(1, 1))\n```"
    assert grade(ADD, half, "def add(a, b): return 7", "def add(a, b:", fenced, "") == [
        1.0,
        0.5,
        0.0,
        0.0,
        1.0,
        0.0,
    ]
    assert grade(ADD, half, all_or_nothing=True) == [1.0, 0.0]


def test_one_string_of_tests_counts_every_assert():
    tests = (
        "import math\nx = add(1, 2)\nassert x == 3\nassert math.isclose(add(.1, .2), .3)\nassert add(1, 1)"
        " == 3\n"
    )
    assert grade(ADD, tests=tests) == [pytest.approx(2 / 3)]
    assert grade(ADD, tests="def check(f):\n    assert f(1, 1) == 2\ncheck(add)") == [1.0]
    with pytest.raises(RecipeError, match="check nothing"):
        grade(ADD, tests="def check(f):\n    assert f(1, 1) == 2\n")
    with pytest.raises(RecipeError, match="not valid Python"):
        grade(ADD, tests=["assert add("])


def test_code_that_completes_a_prompt():
    assert grade("    return a + b\n", row={"prompt": "def add(a, b):\n"}, prefix="prompt") == [1.0]


CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "prints": "print('passed 0 passed 1')\nimport sys; sys.exit()",
    "writes to every pipe": (
        """
import os
for i in range(3, 40):
    try: os.write(i, b'["passed", 0]\\n' * 2)
    except OSError: pass
os._exit(0)"""
    ),
    "equal to all": "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()",
    "equal number": "class All(int):\n    __eq__ = lambda self, other: True\ndef add(a, b): return All(9)",
    "no parser": "import ast\nast.parse = lambda *a: ast.Module([], [])",
    "no builtins": "import builtins\nbuiltins.exec = builtins.vars = builtins.compile = lambda *a: {}",
    "raises": "def add(a, b): raise SystemExit(0)",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=list(CHEATS))
def test_a_test_is_not_passed_by_cheating(code):
    assert grade(code) == [0.0]


def test_cheating_in_containers_and_builtins():
    pair = "class All:\n    def __eq__(self, other): return True\ndef f(): return [All(), (All(),)]"
    assert grade(pair, tests=["assert f() == [1, (2,)]"]) == [0.0]
    lying = "import builtins\nbuiltins.sum = lambda x: 3\ndef f(): return [1]"
    assert grade(lying, tests=["assert sum(f()) == 3"]) == [0.0]
    own = (
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return self.x =="
        " other.x"
    )
    tests = ["assert P(1) == P(1)", "assert [P(1)] == [P(1)]", "assert P(1) == P(2)"]
    assert grade(own, tests=tests) == [pytest.approx(2 / 3)]
