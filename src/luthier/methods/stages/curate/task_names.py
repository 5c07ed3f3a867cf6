"""Rows whose answer is the name of their task: what a model learns that tells tasks apart.

The prompt stays; its completion becomes the value of a column. Plan `conpet` trains the selector of its
modules on such rows (Song et al., 2023).
"""

from __future__ import annotations

from typing import Any

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, without
from luthier.registry import stage


@stage(
    paper="arXiv:2309.14763",
    row="conpet",
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a model is to say which task, domain or source an input is of, as the selector of plan `conpet`"
    " does.",
    costs="nothing.",
    covers="the selector's rows: an input, and the name of its task as the answer.",
    omits="a head of its own with a vector for each task: the language model writes the name.",
    tests=["methods/stages/curate/test_task_names.py::test_the_answer_is_the_name_of_the_task"],
)
class TaskNames(Stage):
    """prompt = the row's, completion = the value of `column`."""

    asks_model = False
    row_by_row = True

    column: str = "source"  # column that names the task of a row; without it all are of one

    def __call__(self, rows, roles):
        out = []
        for row in rows:
            out.append({**without(row), "completions": [name_answer(row, str(row.get(self.column)))]})
        return out


def name_answer(row: dict, name: str) -> Any:
    """A task's name as the completion of a row: a text, or the assistant's turn."""
    return name if isinstance(row["prompt"], str) else [{"role": "assistant", "content": name}]
