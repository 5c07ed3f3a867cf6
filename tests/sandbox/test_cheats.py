"""No program passes a check by deciding itself what it is compared with."""

from __future__ import annotations

import pytest

from helpers.programs import pairs, programs
from luthier.sandbox.sandbox import run

EQUAL = "assert f(2) == 3"
# Objects that say yes to everything; each is tried as the result, in containers, and against every check.
YES = programs("cheats_yes")
# Checks in which the right answer of f(2) is 3, or a list that has 3.
ASKED = programs("checks_of_three")


def results(program: str, checks: list[str], **settings) -> tuple[bool, ...]:
    return run(program, timeout=10, memory_mb=512, checks=checks, **settings).passed


@pytest.mark.parametrize("name", YES)
def test_objects_that_say_yes(name):
    """20 checks x (the object itself, made by a function, or by a class of the function's name)."""
    ends = ("def f(x): return Y()", "f = lambda x: Y()", "class f(Y):\n    def __new__(cls, x): return Y()")
    for end in ends if name in ("eq", "everything") else ends[:1]:
        passed = results(f"{YES[name]}\n{end}", list(ASKED.values()))
        cheated = [check for check, good in zip(ASKED, passed, strict=True) if good]
        assert not cheated, (end, cheated)


INSIDE = pairs("cheats_inside")


@pytest.mark.parametrize("name", INSIDE)
def test_objects_that_say_yes_inside_others(name):
    value, check = INSIDE[name]
    both = f"{YES['everything']}\nclass Z(Y):\n    __hash__ = lambda s: hash(3)\ndef f(x): return {value}"
    assert results(both, [check]) == (False,)


CHANGED = pairs("cheats_changed")


@pytest.mark.parametrize("name", CHANGED)
def test_names_that_the_program_changed(name):
    program, check = CHANGED[name]
    assert results(program, [check]) == (False,)


LOOKING = programs("cheats_looking")


@pytest.mark.parametrize("name", LOOKING)
def test_nothing_to_look_at(name):
    """The second check would pass where the first one told what is expected."""
    checks = ["assert abs(f(2) - 3) < 1e-6", "assert f(2) == 3", "assert f(2) in [3]", "assert f(2) == 3"]
    assert results(LOOKING[name], checks) == (False,) * 4


TALKING = programs("cheats_talking")


@pytest.mark.parametrize("name", TALKING)
def test_no_verdict_of_its_own(name):
    result = run(TALKING[name], timeout=2, memory_mb=512, checks=[EQUAL, EQUAL])
    assert result.passed == (False, False) and not result.ok


def test_a_check_that_swallows_the_end_of_the_program_has_not_passed():
    check = "try:\n    f(2)\nexcept:\n    pass"
    assert results("import os\ndef f(x): os._exit(0)", [check]) == (False,)
