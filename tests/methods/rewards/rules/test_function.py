"""function: your own file, here and in the sandbox."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build
from luthier.sandbox.sandbox import kernel_walls

SOURCE = '''
def brevity(row, text):
    """Shorter than the prompt."""
    return float(len(text) < len(row["prompt"]))

def curious(row, text):
    return 1 if open("/etc/passwd").read() else 0

value = 3
'''
ROW = {"id": "r", "prompt": "12345"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_function_of_your_own(file):
    assert build("reward", {"name": "function", "path": f"{file}:brevity"}).scores(ROW, ["1", "123456"]) == [
        1,
        0,
    ]


@pytest.mark.skipif(not kernel_walls(), reason="no sandbox on this machine")
def test_in_the_sandbox(file):
    apart = {"name": "function", "sandbox": True}
    assert build("reward", {**apart, "path": f"{file}:brevity"}).scores(ROW, ["1", "123456"]) == [1.0, 0.0]
    assert build("reward", {**apart, "path": f"{file}:curious"}).scores(ROW, ["1"]) == [0.0]


@pytest.mark.parametrize(
    "path, words",
    [
        ("{}:nothing", "no function"),
        ("{}:value", "no function"),
        ("x.py:f", "no file"),
        ("{}", "not file.py"),
    ],
)
def test_what_is_not_there_is_refused(file, path, words):
    with pytest.raises(RecipeError, match=words):
        build("reward", {"name": "function", "path": path.format(file)})
