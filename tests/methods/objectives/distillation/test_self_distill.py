"""self_distill: self distillation is nothing at the teacher and keeps the student near."""

from __future__ import annotations

import json
import math

import pytest

import luthier


@pytest.mark.long
def test_self_distillation_is_nothing_at_the_teacher_and_keeps_the_student_near(base, tiny, tmp_path):
    teacher = {"roles": {"teacher": {"name": "model", "model": tiny}}}
    luthier.tune(
        {**base, **teacher, "objective": "sft + self_distill", "max_steps": 1}, folder=tmp_path / "z"
    )
    assert (
        json.loads((tmp_path / "z" / "metrics.jsonl").read_text().splitlines()[0])["loss/self_distill"] == 0
    )
    from safetensors.torch import load_file

    def moved(name: str, objective: str, roles: dict) -> float:
        folder = luthier.tune(
            {**base, **roles, "objective": objective, "max_steps": 12, "learning_rate": 3e-3},
            folder=tmp_path / name,
        ).folder
        a, b = load_file(f"{folder}/model.safetensors"), load_file(f"{tiny}/model.safetensors")
        return math.sqrt(sum(float((a[k].float() - b[k].float()).square().sum()) for k in a))

    assert moved("near", "sft + 5*self_distill", teacher) < moved("free", "sft", {})
