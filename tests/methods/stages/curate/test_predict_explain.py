"""predict_explain: step by step makes two tasks of a row; step by step is the weighted sum of two losses."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.objectives import average, batch_of, gradients, make_rows, text_roles, tokenizer
from helpers.rows import SUMS
from luthier.clock import Clock
from luthier.methods.architectures.text.seq2seq import Seq2Seq
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.recipe.recipe import terms
from luthier.registry import build
from luthier.text.encode import Renderer


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


@pytest.mark.long
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


def student() -> Roles:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = dict(d_model=16, d_ff=32, d_kv=4, num_layers=1, num_decoder_layers=1, num_heads=4)
    tokens = dict(vocab_size=40, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    net = T5ForConditionalGeneration(T5Config(**small, **tokens, dropout_rate=0.0)).eval()
    return Roles(Policy(Seq2Seq(), net, Untuned(net)), Clock(total=1), Renderer(tokenizer()))


def test_an_encoder_decoder_weighs_two_forward_passes():
    """alpha * L_predict + (1 - alpha) * L_explain, each of rows of its own; alpha 1 is SFT."""
    answers = [{**row, "tasks": ["answer"]} for row in make_rows(4, k=1)]
    reasons = [{**row, "id": f"{row['id']}/r", "tasks": ["rationale"]} for row in make_rows(4, k=1, seed=1)]

    def two_tasks(alpha: float):
        both = [("answer", alpha), ("rationale", 1 - alpha)]
        return terms([{"name": "task_sft", "task": task, "weight": weight} for task, weight in both])

    batch = batch_of([*answers, *reasons])
    mixed = float(average(two_tasks(0.3), student(), batch).detach())
    alone = [float(average(terms("sft"), student(), batch_of(rows)).detach()) for rows in (answers, reasons)]
    assert mixed == pytest.approx(0.3 * alone[0] + 0.7 * alone[1], abs=1e-6)
    found = []
    for objective, rows in ((two_tasks(1.0), [*answers, *reasons]), (terms("sft"), answers)):
        roles = student()
        average(objective, roles, batch_of(rows)).backward()
        found.append(gradients(roles.policy.model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)
