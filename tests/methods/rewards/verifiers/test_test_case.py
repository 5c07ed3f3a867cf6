"""test_case: the four classes, of asserts, functions and cases of unittest."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build

ROW = {"id": "r", "solution": "def add(a, b):\n    return a + b\n", "target": "add"}
CASE = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual({}, 3)\n"
)
CLASSES = {
    0.0: ["assert add(1, 2", "", "this is prose about tests"],
    0.25: [
        "assert add(1, 2) == 4",
        "x = add(1, 2)",
        "def test_it():\n    assert add(1) == 2",
        "assert other()",
    ],
    0.5: ["assert 1 + 1 == 2", "def test_it():\n    assert True"],
    1.0: ["assert add(1, 2) == 3", "def test_it():\n    assert add(1, 2) == 3", CASE.format("add(1, 2)")],
}


def test_texts_of_every_class():
    texts = [text for several in CLASSES.values() for text in several]
    classes = [score for score, several in CLASSES.items() for _ in several]
    assert build("reward", "test_case").scores(ROW, texts) == classes
    (fenced,) = build("reward", "test_case").scores(ROW, ["```python\nassert add(1, 2) == 3\n```"])
    assert fenced == 1.0
    with pytest.raises(RecipeError, match="is not valid Python"):
        build("reward", "test_case").scores({**ROW, "solution": "def ("}, ["assert 1"])
