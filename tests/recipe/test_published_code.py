"""Published pipelines for programs, at toy scale."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.published import logged, tune_toy
from luthier import toy
from luthier.methods.rewards.verifiers.efficiency import Efficiency
from luthier.registry import build
from luthier.toy import bandit


@pytest.mark.long
def test_perfrl_learns_faster_programs(tmp_path):
    """The fast program joins the samples, scores highest, and its likelihood rises over SFT's."""
    rows = [{**row, "fast": row["completion"]} for row in toy.rows("code", "new", 16)]
    report = tune_toy("perfrl", tmp_path, {"pairs": rows, "programs": rows})
    likely = [luthier.load(run).logprobs(rows[:8]).mean().item() for run in report.runs]
    assert likely[1] > likely[0]
    assert logged(report.runs[1], "accuracy"), "better and worse programs are compared"


def test_acecode_prefers_the_fast_of_two_right_programs(monkeypatch):
    """Arms are programs; a policy gradient on this reward leaves wrong ones, then slow ones."""
    loop = "def f(x):\n    return sum(i for i in range(x))\n"
    formula = "def f(x):\n    return x * (x - 1) // 2\n"
    wrong = "def f(x):\n    return x\n"
    seconds = {loop: 1.0, formula: 0.4, wrong: 0.1}
    monkeypatch.setattr(Efficiency, "seconds", lambda self, program, checks: seconds[program])
    row = {"id": "r", "tests": ["assert f(5) == 10"], "reference_program": loop}
    reward = torch.tensor(build("reward", "efficiency").scores(row, [loop, formula, wrong]))
    assert reward.tolist() == pytest.approx([1.0, 0.5 + 0.5 * 2.5, -0.3])
    objective = build("objective", {"name": "grpo", "beta": 0.0})
    base = torch.tensor([2.0, 0.0, 1.0])
    course = bandit.study(objective, reward, base, steps=150, rows=4, n=6, fresh_every=1, width=0.0)
    assert course.reward[-1] > 1.6 > course.reward[0], "fast programs are written"


@pytest.mark.long
def test_acecode_at_toy_scale(tmp_path):
    report = tune_toy("acecode", tmp_path)
    assert len(logged(report.folder, "loss")) == 3 and logged(report.folder, "value_loss")
