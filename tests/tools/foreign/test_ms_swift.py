"""ms-swift's command lines and files as recipes: values, not only keys."""

from __future__ import annotations

import pytest

from helpers.paths import FIXTURES
from luthier.recipe.recipe import Recipe
from luthier.tools.foreign.convert import import_file

FOLDER = FIXTURES / "foreign" / "ms_swift"


def imported(name: str) -> Recipe:
    return Recipe.load(import_file(FOLDER / name).recipe)


def notes(name: str) -> dict:
    return {note.key: note for note in import_file(FOLDER / name).notes}


def test_lora():
    recipe = imported("lora_sft.sh")
    tuner = recipe.methods()["tuner"]
    assert (tuner.r, tuner.lora_alpha, tuner.lora_dropout, tuner.target_modules) == (
        8,
        32,
        0.05,
        "all-linear",
    )
    assert [(source["path"], source["limit"]) for source in recipe.data] == [
        ("AI-ModelScope/alpaca-gpt4-data-zh", 500),
        ("AI-ModelScope/alpaca-gpt4-data-en", 500),
        ("swift/self-cognition", 500),
    ]
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 16
    assert (recipe.learning_rate, recipe.lr_scheduler_type, recipe.warmup_steps) == (1e-4, "cosine", 0.05)
    assert (recipe.num_train_epochs, recipe.max_length, recipe.dtype) == (1, 2048, "bfloat16")
    assert (recipe.eval_steps, recipe.save_steps, recipe.save_total_limit) == (50, 50, 2)
    optimizer = recipe.methods()["optim"]
    assert (optimizer.weight_decay, optimizer.adam_beta2) == (0.1, 0.95)
    assert notes("lora_sft.sh")["system"].outcome == "dropped"


def test_devices_count_into_a_step():
    recipe = imported("full_multi_gpu.sh")
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 1 * 2 * 4
    assert (recipe.methods()["tuner"].name, recipe.learning_rate) == ("full", 1e-5)
    assert (recipe.eval_data, recipe.save_steps) == (0.01, 0.5)
    assert recipe.data["format"] == {"name": "messages", "assistant_only_loss": False}


def test_qlora():
    recipe = imported("qlora.sh")
    quantizer, tuner = recipe.methods()["quantization"], recipe.methods()["tuner"]
    assert (quantizer.name, quantizer.double_quant, recipe.dtype) == ("nf4", True, "bfloat16")
    assert (tuner.r, tuner.lora_dropout, tuner.use_rslora) == (16, 0.1, True)
    assert tuner.target_modules == ["q_proj", "k_proj", "v_proj"]
    assert recipe.data["columns"] == {"prompt": "question", "completion": "answer"}
    assert recipe.eval_data["path"] == "data/val.jsonl"
    assert recipe.gradient_accumulation_steps == 16


@pytest.mark.parametrize(
    ("name", "objective", "settings"),
    [
        ("kto.sh", "kto", {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.9}),
        ("orpo.yaml", "orpo", {"beta": 0.3}),
        ("simpo.yaml", "simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
        ("reward.sh", "reward", {"center_rewards_coefficient": 0.01}),
        ("gkd.sh", "distill_jsd", {"beta": 0.5}),
        ("ppo.sh", "grpo", {"beta": 0.04}),
    ],
)
def test_objectives(name, objective, settings):
    aim = imported(name).aim()
    assert aim.name == objective
    assert {key: getattr(aim, key) for key in settings} == settings


def test_dpo_with_a_supervised_term():
    parts = imported("dpo.sh").aim().parts
    assert [(weight, term.name) for weight, term in parts] == [(1.0, "dpo"), (0.1, "chosen_sft")]
    assert parts[0][1].beta == 0.2


def test_grpo():
    recipe = imported("grpo.sh")
    rollout, score = recipe.methods()["online_stages"]
    assert (rollout.n, rollout.max_new_tokens, rollout.temperature, rollout.top_k) == (8, 1024, 0.9, 0)
    assert (rollout.old, recipe.num_iterations) == (True, 2)
    assert [reward.name for reward in score.reward] == ["math"]
    prompts = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    assert prompts * 8 == 4 * 4 * 2
    assert (recipe.aim().beta, recipe.aim().epsilon, recipe.aim().epsilon_high) == (0.04, 0.2, 0.28)


def test_plain_text_and_galore():
    assert imported("pretrain.sh").data == {"path": "swift/chinese-c4", "format": "text"}
    assert imported("pretrain.sh").max_steps == 1000
    recipe = imported("galore.json")
    galore = recipe.chain()[1]
    assert (galore.rank, galore.update_proj_gap, recipe.seed) == (64, 50, 7)
    assert recipe.data == {"path": "tatsu-lab/alpaca", "name": "default", "limit": 2000}
    assert recipe.gradient_checkpointing is False
