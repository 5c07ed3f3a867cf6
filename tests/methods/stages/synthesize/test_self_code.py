"""self_code: what runs and passes stays, endless loops are killed, replies are stored, passing rows teach."""

from __future__ import annotations

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.data.load import load_rows
from luthier.methods.stages.select._short_run import ShortRun, mean_loss, restored
from luthier.registry import build

pytestmark = pytest.mark.long  # endless programs run to their time limit

RIGHT = "def double(x):\n    return 2 * x"
WRONG = ("def double(x):\n    return x", "def double(x):\n    while True: pass", "def double(x:\n")
SEEDS = [
    {"id": f"s{i}", "prompt": "", "completions": [f"def f{i}(x):\n    return x + {i}"]} for i in range(3)
]


def script(prompt: str, seed: int) -> str:
    if prompt.startswith("List the programming concepts"):
        return "- arithmetic\n- functions"
    if prompt.startswith("Write one programming exercise"):
        return f"Double a number, variant {seed}."
    code = RIGHT if seed % 2 else WRONG[seed // 2 % 3]
    return f"[Response]\n```python\n{code}\n```\n[/Response]\n[Tests]\nassert double(4) == 8\n[/Tests]"


def stage(**settings):
    return build("stage", {"name": "self_code", "writer": Scripted(script), "timeout": 2.0, **settings})


def test_only_programs_whose_tests_pass_stay():
    roles = nobody()
    out = list(stage(n=5)(SEEDS, roles))
    assert out and all(RIGHT in row["completions"][0] for row in out)
    assert all("assert double" in row["tests"] for row in out)
    assert all(row["concepts"] == ["arithmetic", "functions"] for row in out)
    assert all(row["prompt"].startswith("Double a number") for row in out)
    assert {row["provenance"]["sources"][0] for row in out} | {*roles.dropped} == {"s0", "s1", "s2"}
    failing = list(stage(n=5, outcome="fail")(SEEDS, nobody()))
    assert failing and not any(RIGHT in row["completions"][0] for row in failing)
    assert any("does not pass its tests" in sentence for sentence in roles.sentences)


def test_a_stage_that_was_killed_asks_nothing_twice(tmp_path):
    whole = stage(n=2)
    out = list(whole(SEEDS, nobody(tmp_path / "whole")))
    cut = stage(n=2)
    ask, count = cut.writer.ask, len(whole.writer.prompts)

    def failing(prompt, **how):
        if len(cut.writer.prompts) == 5:
            raise KeyboardInterrupt
        return ask(prompt, **how)

    cut.writer.ask = failing
    with pytest.raises(KeyboardInterrupt):
        list(cut(SEEDS, nobody(tmp_path / "cut")))
    again = stage(n=2)
    assert list(again(SEEDS, nobody(tmp_path / "cut"))) == out
    assert len(again.writer.prompts) == count - 5


def test_passing_rows_teach_more_than_failing_ones(tiny_roles):
    held_out = load_rows([{"prompt": "Double a number, now.", "completion": RIGHT}]).rows
    losses = []
    for outcome in ("pass", "fail"):
        rows = list(stage(n=5, outcome=outcome)(SEEDS, nobody()))
        with restored(tiny_roles):
            run = ShortRun(tiny_roles, 3e-3, 2, "test")
            for epoch in range(6):
                run.epoch(rows[:2], epoch, 6)
            losses.append(mean_loss(tiny_roles, held_out, 1))
    assert losses[0] < losses[1]
