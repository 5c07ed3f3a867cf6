"""Right programs pass the checks of every common form, and wrong ones fail the same checks."""

from __future__ import annotations

import pytest

from helpers.programs import pairs
from luthier.sandbox.sandbox import run

ADD = "def add(a, b):\n    return a + b"
# (program, one check in which it is right)
HONEST = pairs("honest")


def verdict(program: str, check: str, **settings):
    result = run(program, timeout=10, memory_mb=512, checks=[check], **settings)
    return result.passed == (True,), result


@pytest.mark.parametrize("name", HONEST)
def test_a_right_program_passes(name):
    passed, result = verdict(*HONEST[name])
    assert passed, result


WRONG = "def add(a, b): return a - b if isinstance(a, (int, float)) else a\n"


# checks that say nothing of the sum itself
WEAK = {"unequal", "isinstance", "type is", "pytest raises", "pytest raises match", "try", "truth", "not"}
ADDING = [name for name, (program, _) in HONEST.items() if program.endswith(ADD) and name not in WEAK]


@pytest.mark.parametrize("name", ADDING)
def test_a_wrong_program_fails_the_same_checks(name):
    assert not verdict(WRONG, HONEST[name][1])[0]


def test_standard_input_and_output():
    result = run("a, b = map(int, input().split())\nprint(a + b)", timeout=5, memory_mb=256, stdin="1 2\n")
    assert result.ok and result.stdout == "3\n"


def test_arrays_of_numpy_are_values():
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(n): return np.arange(n) * 2.0\ndef m(): return np.eye(2).mean()"
    checks = [
        "import numpy as np\nassert np.allclose(f(3), [0, 2, 4])",
        "assert f(2).tolist() == [0.0, 2.0] and f(2).shape == (2,)",
        "import numpy as np\nnp.testing.assert_array_equal(f(2), np.array([0, 2]))",
        "assert (f(3) == np.array([0, 2, 4])).all() and m() == 0.5",
        "assert (f(3) == np.array([0, 2, 5])).all()",
    ]
    result = run(program, timeout=30, memory_mb=2048, checks=checks, packages=True)
    assert result.passed == (True, True, True, True, False), result
