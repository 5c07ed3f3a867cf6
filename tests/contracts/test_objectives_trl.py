"""TRL as an oracle: SFT, pairs, KTO, policy gradients and distillation give the losses of its trainers."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import (
    agree,
    batch_of,
    cast,
    make_rows,
    network,
    pair_rows,
    preference_inputs,
    trainer,
)
from luthier.recipe.recipe import terms
from luthier.registry import build


def test_sft_is_trls(trl, tmp_path):
    made, rows = trainer(trl, "SFT", tmp_path, {"prompt": "w3", "completion": "w4"}), make_rows(4, k=1)
    whole = [r["prompt"] + r["completions"][0] for r in rows]
    width = max(map(len, whole))
    labels = [[-100] * len(r["prompt"]) + r["completions"][0] for r in rows]
    inputs = {
        "input_ids": torch.tensor([w + [0] * (width - len(w)) for w in whole]),
        "attention_mask": torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in whole]),
        "labels": torch.tensor([x + [-100] * (width - len(x)) for x in labels]),
    }
    agree(build("objective", "sft"), rows, made.model, made.compute_loss(made.model, inputs))


@pytest.mark.parametrize(
    "ours, settings",
    [
        ({"name": "dpo", "beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
        ({"name": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
        ({"name": "hinge", "beta": 0.3}, {"loss_type": ["hinge"], "beta": 0.3}),
        ("dpo + 0.5*chosen_sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    ids=["dpo", "ipo", "hinge", "rpo"],
)
def test_pairs_are_trls(trl, tmp_path, ours, settings):
    rows = pair_rows()
    made = trainer(
        trl,
        "DPO",
        tmp_path,
        {"prompt": "w3", "chosen": "w4", "rejected": "w5"},
        settings,
        ref_model=network(off_by=0.05),
    )
    agree(terms(ours), rows, made.model, made.compute_loss(made.model, preference_inputs(rows)))


def test_smoothed_dpo_is_trls(trl, tmp_path):
    """TRL's sigmoid loss has lost label_smoothing; its `aot` on a batch of one pair is that loss."""
    rows, settings = pair_rows(), {"loss_type": ["aot"], "label_smoothing": 0.2}
    made = trainer(
        trl,
        "DPO",
        tmp_path,
        {"prompt": "w3", "chosen": "w4", "rejected": "w5"},
        settings,
        ref_model=network(off_by=0.05),
    )
    theirs = sum(made.compute_loss(made.model, preference_inputs([r])) for r in rows) / 4
    agree(build("objective", {"name": "dpo", "label_smoothing": 0.2}), rows, made.model, theirs)


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize(
    "ours, settings",
    [
        ({"name": "grpo"}, {"loss_type": "grpo", "beta": 0.04}),
        (
            {"name": "grpo", "beta": 0.0, "scale_rewards": "batch"},
            {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "batch"},
        ),
        ({"name": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (
            {"name": "dapo", "beta": 0.1, "epsilon_high": None, "epsilon": 0.1},
            {"loss_type": "bnpo", "beta": 0.1, "epsilon": 0.1},
        ),
        (
            {"name": "grpo", "use_bias_correction_kl": False},
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        ),
        (
            {"name": "dr_grpo", "max_completion_length": 32},
            {"loss_type": "dr_grpo", "max_completion_length": 32, "scale_rewards": "none"},
        ),
        (
            {"name": "gspo", "beta": 0.1, "epsilon": 0.1, "epsilon_high": None},
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "epsilon": 0.1},
        ),
        (
            {"name": "cispo", "beta": 0.1, "epsilon_high": 1.1},
            {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 1.1},
        ),
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_policy_gradients_are_trls(trl, tmp_path, ours, settings, old):
    """Their advantages, their reference log-probabilities and their loss, on our samples."""
    rows = make_rows(2, k=4)
    rows[0]["scores"] = [0.2, 0.9, 0.9, -1.0]
    network(off_by=0.05).save_pretrained(tmp_path / "reference")
    policy = network()
    policy.config._name_or_path = str(tmp_path / "reference")  # where TRL looks for the reference
    flat = [(r["prompt"], c, s) for r in rows for c, s in zip(r["completions"], r["scores"], strict=True)]
    prompts, completions, scores = ([x[i] for x in flat] for i in range(3))
    settings = {"num_generations": 4, **settings}
    made = trainer(
        trl,
        "GRPO",
        tmp_path,
        {"prompt": "w3"},
        settings,
        model=policy,
        reward_funcs=lambda prompts, **_: scores,
    )
    made._generate = lambda _: (prompts, completions, None, ["" for _ in flat], None, {}, None, [])
    inputs = made._generate_and_score_completions([{"prompt": "w3"} for _ in flat])
    inputs = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    if old:
        noise = torch.Generator().manual_seed(3)
        sampled = cast().policy.logprobs(batch_of(rows)).detach()
        sampled = (sampled + 0.3 * torch.randn(sampled.shape, generator=noise)).split(
            [len(c) for c in completions]
        )
        padded = torch.nn.utils.rnn.pad_sequence(list(sampled), batch_first=True)
        inputs["old_per_token_logps"] = padded
        parts = [s.tolist() for s in sampled]
        rows = [{**r, "old_logprobs": parts[4 * i : 4 * i + 4]} for i, r in enumerate(rows)]
    agree(build("objective", ours), rows, made.model, made.compute_loss(made.model, inputs))


@pytest.mark.parametrize("beta, old", [(0.1, False), (0.0, True)], ids=["fresh", "reused"])
def test_rloo_is_trls(trl, tmp_path, beta, old):
    rows = make_rows(2, k=4)
    network(off_by=0.05).save_pretrained(tmp_path / "reference")
    policy = network()
    policy.config._name_or_path = str(tmp_path / "reference")
    flat = [(r["prompt"], c, s) for r in rows for c, s in zip(r["completions"], r["scores"], strict=True)]
    prompts, completions, scores = ([x[i] for x in flat] for i in range(3))
    made = trainer(
        trl,
        "RLOO",
        tmp_path,
        {"prompt": "w3"},
        {"num_generations": 4, "beta": beta},
        model=policy,
        reward_funcs=lambda prompts, **_: scores,
    )
    made._generate = lambda _: (prompts, completions, ["" for _ in flat])
    inputs = made._generate_and_score_completions([{"prompt": "w3"} for _ in flat])
    inputs = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    if old:
        sampled = cast().policy.logprobs(batch_of(rows)).detach()
        sampled = sampled + 0.3 * torch.randn(sampled.shape, generator=torch.Generator().manual_seed(3))
        parts = [part.tolist() for part in sampled.split([len(c) for c in completions])]
        inputs["old_logps"] = torch.tensor([sum(part) for part in parts])
        rows = [{**r, "old_logprobs": parts[4 * i : 4 * i + 4]} for i, r in enumerate(rows)]
    theirs = made.compute_loss(made.model, inputs)
    agree(build("objective", {"name": "rloo", "beta": beta}), rows, made.model, theirs)


@pytest.mark.parametrize("name, beta", [("distill", 0.0), ("distill_reverse", 1.0), ("distill_jsd", 0.3)])
def test_distillation_is_trls(trl, name, beta):
    divergence = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss
    rows, roles = pair_rows(), cast()
    student, teacher = roles.policy.outputs(batch_of(rows)), roles.teacher.outputs(batch_of(rows))
    heads = (roles.policy.model.lm_head.weight, roles.teacher.model.lm_head.weight)
    everything = torch.ones(1, len(student.hidden), dtype=torch.long)
    theirs, *_ = divergence(
        student.hidden[None], teacher.hidden[None], *heads, everything, beta, temperature=2.0
    )
    spec = {"name": name, "temperature": 2.0, **({"beta": beta} if name == "distill_jsd" else {})}
    # the factor temperature^2 is ours, and the paper's
    agree(terms(spec), rows, roles.policy.model, 4 * theirs)
