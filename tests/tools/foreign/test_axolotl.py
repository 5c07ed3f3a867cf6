"""axolotl's configurations as recipes: values, not only keys."""

from __future__ import annotations

from helpers.paths import FIXTURES
from luthier.recipe.recipe import Recipe
from luthier.tools.foreign import axolotl
from luthier.tools.foreign.convert import check, convert, import_file
from luthier.tools.foreign.read import Written

FOLDER = FIXTURES / "foreign" / "axolotl"


def imported(name: str) -> Recipe:
    return Recipe.load(import_file(FOLDER / name).recipe)


def notes(name: str) -> dict:
    return {note.key: note for note in import_file(FOLDER / name).notes}


def of(**keys) -> Recipe:
    """A small configuration with further keys, as a recipe."""
    values = {"base_model": "m", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], **keys}
    return check(convert(Written(values), axolotl))


def test_lora():
    recipe = imported("lora.yml")
    tuner = recipe.methods()["tuner"]
    assert (tuner.r, tuner.lora_alpha, tuner.lora_dropout) == (16, 32, 0.05)
    assert tuner.target_modules == ["gate_proj", "down_proj", "up_proj", "q_proj"]
    assert recipe.quantization is None
    assert recipe.data == {"path": "teknium/GPT4-LLM-Cleaned", "format": "alpaca"}
    assert (recipe.eval_data, recipe.max_length) == (0.1, 2048)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 2)
    assert (recipe.learning_rate, recipe.lr_scheduler_type, recipe.warmup_steps) == (2e-4, "cosine", 0.1)
    assert (recipe.num_train_epochs, recipe.eval_steps, recipe.save_steps) == (1, 0.25, 0.999)
    assert (recipe.gradient_checkpointing, recipe.dtype, recipe.report_to) == (True, "auto", [])
    assert notes("lora.yml")["optimizer"].outcome == "mapped" and recipe.optim["name"] == "adamw_8bit"


def test_qlora_without_warm_up():
    recipe = imported("qlora_fsdp.yml")
    assert recipe.methods()["quantization"].name == "nf4"
    assert recipe.methods()["tuner"].target_modules == "all-linear"
    assert (recipe.lr_scheduler_type, recipe.warmup_steps, recipe.eval_data) == ("constant", 0, 0)
    assert (recipe.save_steps, recipe.eval_steps) == (0.25, None)
    assert recipe.data["split"] == "train"
    assert notes("qlora_fsdp.yml")["fsdp"].outcome == "dropped"


def test_conversations_with_their_field_maps():
    recipe = imported("full_chat.yml")
    first, second = recipe.data
    assert first["columns"] == {"messages": "conversations"}
    assert first["tags"] == {"from": "role", "value": "content"}
    assert second["tags"] == {"human": "user", "question": "user", "gpt": "assistant"}
    assert recipe.methods()["tuner"].name == "full"
    assert recipe.methods()["architecture"].neftune_noise_alpha == 5
    assert (recipe.warmup_steps, recipe.gradient_checkpointing, recipe.save_total_limit) == (100, True, 3)
    assert notes("full_chat.yml")["val_set_size"].outcome == "changed"


def test_learning_from_prompts_and_files():
    recipe = imported("sharegpt_legacy.yml")
    assert [source["path"] for source in recipe.data] == ["a.jsonl", "b.jsonl"]
    assert recipe.data[0]["format"] == {"name": "sharegpt", "assistant_only_loss": False}
    assert recipe.methods()["quantization"].name == "int8"
    assert recipe.methods()["optim"].name == "lion"
    assert (recipe.max_steps, recipe.chat_template) == (500, "chatml")
    assert "train_on_inputs" not in of(train_on_inputs=False).data
    assert of(train_on_inputs=True).data == {"path": "a.jsonl", "format": "alpaca"}


def test_preferences():
    recipe = imported("dpo.yml")
    assert (recipe.aim().name, recipe.aim().beta) == ("dpo", 0.2)
    assert recipe.data["columns"] == {"prompt": "conversation", "chosen": "chosen", "rejected": "rejected"}
    ipo = imported("dpo_intel.yml")
    assert (ipo.aim().name, ipo.data["columns"]) == ("ipo", {"prompt": "question"})
    kto = imported("kto.yml").aim()
    assert (kto.beta, kto.desirable_weight) == (0.5, 0.2)
    assert (imported("orpo.yml").aim().name, imported("orpo.yml").aim().beta) == ("orpo", 0.2)
    parts = imported("simpo.yml").aim().parts
    assert [(weight, term.name) for weight, term in parts] == [(1.0, "simpo"), (0.1, "chosen_sft")]
    assert parts[0][1].simpo_gamma == 1.0


def test_samples():
    recipe = imported("grpo.yml")
    rollout, score = recipe.methods()["online_stages"]
    assert (rollout.n, rollout.max_new_tokens) == (4, 256)
    assert [reward.name for reward in score.reward] == ["math"]
    assert score.reward_weights == [2.0]
    assert (recipe.aim().name, recipe.aim().beta, recipe.aim().max_completion_length) == (
        "dr_grpo",
        0.001,
        256,
    )
    prompts = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    assert prompts * rollout.n == 8 * 4
    assert notes("grpo.yml")["reward_funcs"].outcome == "changed"


def test_other_kinds_of_rows():
    assert imported("pretrain.yml").data == {"path": "allenai/c4", "name": "en", "format": "text"}
    assert imported("reward.yml").methods()["architecture"].name == "reward_model"
    recipe = imported("own_prompt.yml")
    assert recipe.data[0]["prompt_layout"]["format"] == "Q: {instruction}\nA: "
    assert recipe.data[0]["columns"] == {"instruction": "q", "output": "a"}
    assert recipe.data[1]["columns"] == {"text": "body"}
    assert recipe.data[2]["columns"]["output"] == "response"
    assert recipe.eval_data["path"] == "held.jsonl"
    assert (recipe.methods()["tuner"].name, recipe.methods()["tuner"].n_layers) == ("lisa", 4)


def test_defaults_are_those_of_the_tool():
    recipe = of()
    assert (recipe.lr_scheduler_type, recipe.warmup_steps, recipe.max_length) == ("cosine", 0.03, 512)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 1
    assert recipe.methods()["tuner"].name == "full"
    assert of(batch_size=12, micro_batch_size=4).gradient_accumulation_steps == 3


def test_a_ratio_of_rates():
    names = [t.name for t in of(adapter="lora", lora_r=8, loraplus_lr_ratio=16).chain()]
    assert names == ["clip", "adam", "weight_decay", "lora_plus"]
