"""Reward models that are tuned, whole and by steps, and pairs from the step that goes wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luthier
from helpers.models import make_tokenizer
from helpers.rows import PAIRS
from luthier.methods.architectures.text.reward_model import RewardModel
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded


def batch_of(rows):
    return collate(
        rows, lambda r: Encoded(r["prompt"], r["completions"], [[True] * len(c) for c in r["completions"]])
    )


ROWS = [
    {"id": "a", "prompt": [7, 8, 9], "completions": [[10, 11], [12, 13, 14]], "scores": [1.0, 0.0]},
    {"id": "b", "prompt": [7, 8], "completions": [[20, 11, 12], [12]], "scores": [0.0, 1.0]},
]


def test_the_value_of_a_token_is_what_the_head_says_after_it(judge):
    net, batch = judge.policy.model, batch_of(ROWS)
    with torch.no_grad():
        values = judge.policy.outputs(batch).values
        plain = RewardModel().plain(net, judge.policy.attached, batch)
        whole = [torch.tensor([r["prompt"] + c]) for r in ROWS for c in r["completions"]]
        # transformers' own: at the last token
        theirs = torch.cat([net(ids).logits.squeeze(-1) for ids in whole])
    torch.testing.assert_close(values, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.last(values), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_reward_is_trls(judge, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    net = RewardModel().load(judge.policy.model.config._name_or_path, dtype=torch.float32)
    net.load_state_dict(judge.policy.model.state_dict())
    config = trl.RewardConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        center_rewards_coefficient=0.3,
    )
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    made = trl.RewardTrainer(model=net, args=config, train_dataset=data, processing_class=make_tokenizer())
    made.model.eval()
    sides = [[r["prompt"] + r["completions"][r["scores"].index(s)] for r in ROWS] for s in (1.0, 0.0)]
    flat = [ids for side in sides for ids in side]
    width = max(map(len, flat))
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in flat]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in flat]),
    }
    theirs = made.compute_loss(made.model, dict(inputs))
    objective = build("objective", {"name": "reward", "center_rewards_coefficient": 0.3})
    judge.policy.zero_grad()
    ours = objective.loss(judge, batch_of(ROWS)).mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    ours.backward()
    theirs.backward()
    for (name, p), q in zip(judge.policy.model.named_parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_margin_is_asked_for_and_ties_teach_nothing(judge):
    objective = build("objective", "reward")
    rows = [{**r, "margin": 1.5} for r in ROWS]
    with torch.no_grad():
        reward = batch_of(ROWS).last(judge.policy.outputs(batch_of(ROWS)).values).view(2, 2)
        gap = torch.stack([reward[0, 0] - reward[0, 1], reward[1, 1] - reward[1, 0]])
        torch.testing.assert_close(
            objective.loss(judge, batch_of(rows)), -F.logsigmoid(gap - 1.5), atol=1e-5, rtol=1e-5
        )
    judge.policy.zero_grad()
    objective.loss(judge, batch_of([{**r, "scores": [1.0, 1.0]} for r in ROWS])).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in judge.policy.model.parameters())


@pytest.mark.long
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_reward_model_is_tuned_from_a_recipe(tiny, tmp_path, tuner):
    recipe = {
        "model": tiny,
        "architecture": "reward_model",
        "data": PAIRS,
        "eval_data": 0,
        "objective": "reward",
        "tuner": tuner,
        "max_steps": 10,
        "learning_rate": 3e-3,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "evaluate": ["reward"],
        "save_steps": 100,
    }
    report = luthier.tune(recipe, folder=tmp_path / "run")
    assert (
        report.after["reward_accuracy"] > 0.9
        and report.after["reward_margin"] > report.before["reward_margin"] + 0.1
    )
