"""Published pipelines for reasoning, at toy scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from helpers.published import logged, tune_toy
from luthier.recipe.published import find_published
from luthier.registry import build
from luthier.storage.files import read_rows


@pytest.mark.slow
@pytest.mark.long
def test_bolt_at_toy_scale(tmp_path):
    """Rows of a wrong form or a wrong solution leave; the tuned model thinks before it answers; DPO begins at
    its own reference, on its own samples.
    """
    rows = find_published("bolt-longcot").rows["bootstrapped"].toy
    odd = [
        {"prompt": "1+1=", "completion": "<think>one more</think> 2", "answer": "2"},
        {"prompt": "1+2=", "completion": "<think>a</think><think>b</think><answer>3</answer>", "answer": "3"},
    ]
    report = tune_toy("bolt-longcot", tmp_path, {"bootstrapped": [*rows, *odd]})
    thinking, online = report.runs
    learned = {row["prompt"] for row in read_rows(Path(thinking) / "rows.jsonl")}
    assert learned <= {row["prompt"] for row in rows}
    model, start = luthier.load(thinking), luthier.load("toy:lm-small")
    texts = [model.generate(row["prompt"], max_new_tokens=64) for row in rows]
    before = [start.generate(row["prompt"], max_new_tokens=64) for row in rows]
    form = build("reward", "format")
    assert sum(form.scores({}, texts)) >= 6 and sum(map(len, texts)) > 3 * sum(map(len, before))
    assert logged(online, "loss")[0] == pytest.approx(0.693, abs=1e-2)


@pytest.mark.slow
@pytest.mark.long
def test_qwen_math_at_toy_scale(tmp_path):
    """Four runs; the reward model's loss falls, and GRPO reads that model."""
    report = tune_toy("qwen2.5-math", tmp_path)
    assert len(report.runs) == 4
    losses = logged(report.runs[2], "loss")
    assert losses[-1] < losses[0]
    recipe = json.dumps(luthier.Recipe.load(Path(report.runs[3]) / "recipe.yaml").written(), default=str)
    assert str(report.runs[2]) in recipe


@pytest.mark.slow
@pytest.mark.long
def test_exams_in_the_given_form(tmp_path):
    """Topic, solution and answer become likely, by an adapter on coded weights; the answers score in full."""
    rows = find_published("zno-cot-tuning").rows["exams"].toy
    report = tune_toy("zno-cot-tuning", tmp_path, changes={"eval_data": rows})
    losses = logged(report.folder, "loss")
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for row in rows:
        assert build("reward", "matching").scores(row, [row["completion"]]) == [1.0]


@pytest.mark.slow
@pytest.mark.long
def test_solutions_then_judgements_then_solutions(tmp_path):
    """Three runs, each from the last; the second tells right from wrong, by likelihood."""
    rows = find_published("math-ft-ssft-reranking").rows["judgements"].toy
    report = tune_toy("math-ft-ssft-reranking", tmp_path, changes={"eval_data": rows})
    assert len(report.runs) == 3
    judge = luthier.load(report.runs[1])
    for row, other in zip(rows, [rows[1], rows[0]] * 2):
        wrong = {**row, "completion": other["completion"]}
        assert judge.logprobs([row]).sum() > judge.logprobs([wrong]).sum()
