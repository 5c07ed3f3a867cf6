"""predict_explain: step by step makes two tasks of a row; step by step is the weighted sum of two losses."""

from __future__ import annotations

import pytest

import luthier
from helpers.objectives import text_roles
from helpers.rows import SUMS
from luthier.registry import build


def test_step_by_step_makes_two_tasks_of_a_row():
    stage = build("stage", "predict_explain")
    rows = [
        {"id": 0, "prompt": "2+3=", "completions": ["5"], "rationale": "3 after 2 is 5"},
        {"id": 1, "prompt": "1+1=", "completions": ["2"]},
    ]
    made = list(stage(rows, text_roles()))
    assert [(r["prompt"], r["completions"], r["tasks"]) for r in made] == [
        ("2+3=", ["5"], ["answer"]),
        ("[rationale] 2+3=", ["3 after 2 is 5"], ["rationale"]),
    ]


def test_step_by_step_is_the_weighted_sum_of_two_losses(base, tmp_path):
    rows = [{**r, "rationale": f"because of {r['answer']}"} for r in SUMS]
    both = {
        **base,
        "data": rows,
        "stages": ["predict_explain"],
        "max_steps": 1,
        "per_device_train_batch_size": 16,
    }
    losses = {}
    for alpha in (0.3, 1.0, 0.0):
        terms = [
            {"name": "task_sft", "task": "answer", "weight": alpha},
            {"name": "task_sft", "task": "rationale", "weight": 1 - alpha},
        ]
        losses[alpha] = luthier.tune({**both, "objective": terms}, folder=tmp_path / str(alpha)).losses[0]
    assert losses[0.3] == pytest.approx(0.3 * losses[1.0] + 0.7 * losses[0.0], rel=1e-5)
