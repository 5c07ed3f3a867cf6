"""Programs graded by the reward `python_tests`."""

from __future__ import annotations

from luthier.registry import build

TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def grade(*texts, tests=TESTS, row=(), **settings):
    return build("reward", {"name": "python_tests", **settings}).scores(
        {"tests": tests, **dict(row)}, list(texts)
    )
