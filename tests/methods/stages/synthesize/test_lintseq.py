"""lintseq: edits give the program, states have no new errors, lines leave with what hangs on them."""

from __future__ import annotations

import inspect
import textwrap

import torch

import luthier.methods.evaluators.quality._overlap as overlap
import luthier.methods.stages.select.deduplicate as deduplicate
import luthier.methods.stages.select.kmq as kmq
import luthier.sandbox.code as code_module
from helpers.synthesis import nobody
from luthier.methods.stages.synthesize.lintseq import applied, errors, insertions, states
from luthier.registry import build

LOOP = (
    "import math\n\ndef area(r):\n    # of a circle\n    if r < 0:\n        raise ValueError\n"
    "    else:\n        s = r * r\n    return math.pi * s\n\n\nprint(area(2))\n"
)


def programs() -> list[str]:
    """Functions of this repository by themselves, with names that they leave to their module."""
    out = [LOOP]
    for module in (overlap, deduplicate, kmq, code_module):
        for _, f in inspect.getmembers(module, inspect.isfunction):
            if f.__module__ == module.__name__:
                out.append(textwrap.dedent(inspect.getsource(f)))
    return [code for code in out if len(code.split("\n")) < 40]


def draw(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def joined(code: str, state: list[int]) -> str:
    lines = code.split("\n")
    return "\n".join(lines[k] for k in state)


def test_edits_give_the_program_byte_for_byte():
    for code in programs():
        for number in range(6):
            edits = insertions(code, states(code, draw(number), linter=number % 3 > 0))
            assert applied(edits) == code


def test_no_state_has_a_new_error_and_most_of_the_controls_do():
    wrong = {True: 0, False: 0}
    count = {True: 0, False: 0}
    for code in programs():
        allowed = {message for _, message in errors(code)}
        for number in range(12):
            linter = number > 0
            for state in states(code, draw(number), linter)[1:-1]:
                messages = {message for _, message in errors(joined(code, state))}
                count[linter] += 1
                wrong[linter] += not messages <= allowed
    assert count[True] > 200 and wrong[True] == 0
    assert wrong[False] > 0.3 * count[False]


def test_what_the_linter_sees():
    assert errors("def f(x):\n    return x + y\n") == [(2, "undefined name y")]
    assert errors("if 1:\nx = 2\n") == [(1, "syntax")]
    assert errors("def f():\n    g()\n\ndef g():\n    return [k for k in range(3)]\n") == []


def test_rows_have_several_sequences_and_others_leave():
    rows = [
        {"id": "a", "prompt": "area", "completions": [f"```python\n{LOOP}\n```"]},
        {"id": "b", "prompt": "area", "completions": ["def area(:"]},
    ]
    roles = nobody()
    stage = build("stage", {"name": "lintseq", "sequences": 3})
    out = list(stage(rows, roles))
    assert [row["id"] for row in out] == ["a/0", "a/1", "a/2"] and "1 of 2 rows" in roles.sentences[0]
    assert len({row["completions"][0] for row in out}) > 1
    for row in out:
        assert applied(row["completions"][0].split(stage.separator)).strip() == LOOP.strip()
