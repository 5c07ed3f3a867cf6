"""self_distill: self distillation is nothing at the teacher and keeps the student near."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import luthier
from helpers.objectives import fit, role, small_llama
from luthier.recipe.recipe import terms


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


@pytest.mark.slow
@pytest.mark.long
def test_the_students_fine_tuning_is_no_less_accurate():
    """Three stages: a first round on the domain's texts gives the teacher; the student begins where it began,
    learns the same texts near it, and stays nearer to the start; tuned on few labels it is as accurate.
    """
    domain = []
    for i in range(24):  # texts in which a token decides what follows
        word = 5 + i % 8
        domain.append({"id": f"d{i}", "prompt": [word], "completions": [[word + 10, word, word + 18]]})
    labelled = [{"id": f"l{i}", "prompt": [5 + i, 3], "completions": [[35 + i % 2]]} for i in range(8)]

    def trained(roles, objective: str, rows, steps: int) -> None:
        fit(roles, terms(objective), rows, steps=steps, size=16)

    def weights(roles):
        return {name: p.detach().clone() for name, p in roles.policy.model.named_parameters()}

    def distance(a, b) -> float:
        return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))

    @torch.no_grad()
    def accuracy(roles) -> float:
        logits = roles.policy.model(torch.tensor([row["prompt"] for row in labelled])).logits[:, -1]
        right = torch.tensor([row["completions"][0][0] for row in labelled])
        return float((logits.argmax(-1) == right).float().mean())

    start = weights(small_llama())
    plain, student = small_llama(), small_llama()
    trained(plain, "sft", domain, 40)
    student.players["teacher"] = role(copy.deepcopy(plain.policy.model), "teacher")
    trained(student, "sft + 3*self_distill", domain, 40)
    assert distance(weights(student), start) < distance(weights(plain), start)
    for roles in (plain, student):
        trained(roles, "sft", labelled, 25)
    assert accuracy(student) >= accuracy(plain) > 0.6
