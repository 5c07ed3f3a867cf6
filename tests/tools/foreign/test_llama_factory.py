"""LLaMA-Factory's configurations as recipes: values, not only keys."""

from __future__ import annotations

import json

import pytest

from helpers.paths import FIXTURES
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.tools.foreign import llama_factory
from luthier.tools.foreign.convert import check, convert, import_file
from luthier.tools.foreign.read import Written

FOLDER = FIXTURES / "foreign" / "llama_factory"


def imported(name: str) -> Recipe:
    return Recipe.load(import_file(FOLDER / name).recipe)


def of(**keys) -> Recipe:
    """A small configuration with further keys, as a recipe."""
    values = {"model_name_or_path": "m", "stage": "sft", "dataset": "d", **keys}
    return check(convert(Written(values), llama_factory))


def test_lora_sft():
    recipe = imported("lora_sft.yaml")
    tuner = recipe.methods()["tuner"]
    assert (tuner.r, tuner.lora_alpha, tuner.lora_dropout, tuner.target_modules) == (8, 16, 0.0, "all-linear")
    assert recipe.data == [
        {"path": "data/dataset_info.json", "name": "identity", "limit": 1000},
        {"path": "data/dataset_info.json", "name": "alpaca_en_demo", "limit": 1000},
    ]
    assert recipe.eval_data == 0.1
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (1, 8)
    assert (recipe.learning_rate, recipe.lr_scheduler_type, recipe.warmup_steps) == (1e-4, "cosine", 0.1)
    assert (recipe.num_train_epochs, recipe.max_length, recipe.dtype) == (3, 2048, "bfloat16")
    assert (recipe.save_steps, recipe.eval_steps, recipe.logging_steps) == (500, 500, 10)
    assert recipe.overwrite
    assert recipe.report_to == []


def test_qlora():
    recipe = imported("qlora_sft.yaml")
    quantizer, tuner = recipe.methods()["quantization"], recipe.methods()["tuner"]
    assert (quantizer.name, quantizer.double_quant) == ("nf4", False)
    assert (tuner.r, tuner.lora_alpha, tuner.lora_dropout, tuner.use_rslora) == (16, 16, 0.05, True)
    assert tuner.target_modules == ["q_proj", "v_proj"]
    assert (recipe.lr_scheduler_type, recipe.warmup_steps, recipe.learning_rate) == ("constant", 20, 2e-4)


def test_full_fine_tuning():
    recipe = imported("full_sft_deepspeed.yaml")
    assert recipe.methods()["tuner"].name == "full"
    assert recipe.methods()["architecture"].neftune_noise_alpha == 5
    assert recipe.methods()["optim"].weight_decay == 0.1
    assert (recipe.lr_scheduler_type, recipe.save_steps) == ("cosine_with_min_lr", 0.5)
    notes = {note.key: note for note in import_file(FOLDER / "full_sft_deepspeed.yaml").notes}
    assert notes["deepspeed"].outcome == "dropped"
    assert recipe.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert notes["lr_scheduler_kwargs"].outcome == "mapped"


def test_preferences():
    parts = imported("dpo.yaml").aim().parts
    assert [(weight, term.name) for weight, term in parts] == [(1.0, "dpo"), (0.5, "chosen_sft")]
    simpo = imported("simpo.yaml").aim()
    assert (simpo.name, simpo.beta, simpo.simpo_gamma) == ("simpo", 2.5, 1.4)
    assert (imported("orpo.yaml").aim().name, imported("orpo.yaml").aim().beta) == ("orpo", 0.1)
    kto = imported("kto.yaml").aim()
    assert (kto.beta, kto.desirable_weight, kto.undesirable_weight) == (0.2, 1.0, 0.8)


def test_reward_and_ppo():
    assert imported("reward.yaml").methods()["architecture"].name == "reward_model"
    recipe = imported("ppo.yaml")
    rollout = recipe.methods()["online_stages"][0]
    assert (rollout.max_new_tokens, rollout.top_p, rollout.top_k, rollout.temperature) == (512, 0.9, 0, 0.95)
    notes = {note.key: note for note in import_file(FOLDER / "ppo.yaml").notes}
    assert (notes["stage"].outcome, notes["reward_model"].outcome) == ("changed", "changed")


def test_plain_text():
    assert imported("pretrain.yaml").data["format"] == "text"
    assert imported("pretrain.yaml").data["columns"] == {"text": "text"}


def test_chains_of_transforms():
    names = [transform.name for transform in imported("loraplus_dora.yaml").chain()]
    assert names == ["clip", "adam", "weight_decay", "lora_plus"]
    assert imported("loraplus_dora.yaml").chain()[0].max_grad_norm == 0.5
    galore = imported("galore.yaml").chain()[1]
    assert (galore.name, galore.rank, galore.scale) == ("galore", 128, 2.0)


def test_devices_keep_the_effective_batch_size():
    recipe = imported("lora_sft.sh")
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 2 * 4 * 2
    four = import_file(FOLDER / "lora_sft.yaml", devices=4).recipe
    assert four["gradient_accumulation_steps"] == 32


def test_defaults_are_those_of_the_tool():
    recipe = of()
    assert (recipe.learning_rate, recipe.num_train_epochs, recipe.max_length) == (5e-5, 3, 2048)
    assert (recipe.lr_scheduler_type, recipe.warmup_steps) == ("linear", 0)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (8, 1)
    assert of(dataset_dir="ONLINE", dataset="a/b").data == {"path": "a/b"}
    assert of(eval_dataset="e").eval_data == {"path": "data/dataset_info.json", "name": "e"}


def test_learning_from_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    info = {"d": {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    assert of(train_on_prompt=True).data["format"] == {"name": "sharegpt", "assistant_only_loss": False}


def test_unknown_keys_are_all_told_at_once():
    values = {"model_name_or_path": "m", "dataset": "d", "lora_rnak": 3, "nonsense": 1}
    unknown = convert(Written(values), llama_factory).of("unknown")
    assert [note.key for note in unknown] == ["lora_rnak", "nonsense"]
    assert "lora_rank" in unknown[0].why


def test_images_are_refused():
    with pytest.raises(RecipeError, match="images"):
        of(model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct", image_max_pixels=262144)
