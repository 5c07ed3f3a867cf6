"""task_names: the answer is the name of the task, in the row's form."""

from __future__ import annotations

from helpers.synthesis import nobody
from luthier.registry import build

ROWS = [
    {"id": "0", "prompt": "a fine day", "completions": ["good", "bad"], "scores": [1, 0], "source": "moods"},
    {"id": "1", "prompt": [{"role": "user", "content": "2+2"}], "completions": [["4"]], "source": 7},
]


def test_the_answer_is_the_name_of_the_task():
    plain, turns = build("stage", "task_names")(ROWS, nobody())
    assert plain == {"id": "0", "prompt": "a fine day", "completions": ["moods"], "source": "moods"}
    assert turns["prompt"] == ROWS[1]["prompt"]
    assert turns["completions"] == [[{"role": "assistant", "content": "7"}]]
