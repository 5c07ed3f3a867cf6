"""Published pipelines for programs, at toy scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from helpers.published import logged, tune_toy
from luthier import toy
from luthier.methods.rewards.verifiers.efficiency import Efficiency
from luthier.recipe.published import find_published
from luthier.registry import build
from luthier.storage.files import read_rows
from luthier.toy import bandit


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.long
def test_acecode_at_toy_scale(tmp_path):
    report = tune_toy("acecode", tmp_path)
    assert len(logged(report.folder, "loss")) == 3 and logged(report.folder, "value_loss")


@pytest.mark.slow
@pytest.mark.long
def test_refactoring_at_toy_scale(tmp_path):
    """A small network writes programs with an extracted function; a heavy KL holds PPO at them."""
    heavy = {"plan": [{}, {"online_stages": [{}, {}, {"kl_coef": 1e3}]}]}
    report = tune_toy("rl-refactoring", tmp_path, changes=heavy)
    row = find_published("rl-refactoring").rows["pairs"].toy[0]
    model = luthier.load(report.runs[0])
    text = model.generate(row["prompt"], max_new_tokens=64)
    start = luthier.load("toy:seq2seq").generate(row["prompt"], max_new_tokens=64)
    before, after = build("reward", "extract_method").scores(row, [start, text])
    assert after > before, text
    difference = model.logprobs([row]) - luthier.load(report.runs[1]).logprobs([row])
    assert difference.abs().max() < 0.5


@pytest.mark.slow
@pytest.mark.long
def test_tests_that_pass_are_learned(tmp_path):
    """Of five rows one fails and one never calls; what is left is learned and parses."""
    report = tune_toy("text-to-testcase", tmp_path)
    rows = find_published("text-to-testcase").rows["tests"].toy
    model, judge = luthier.load(report.folder), build("reward", "test_case")
    written = [judge.scores(row, [model.generate(row["prompt"], max_new_tokens=24)])[0] for row in rows]
    assert sum(score > 0 for score in written) >= 4, written
    learned = [row["prompt"] for row in read_rows(Path(report.folder) / "rows.jsonl")]
    assert set(learned) <= {row["prompt"] for row in rows[:3]}
