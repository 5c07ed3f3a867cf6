"""TRL's files and command lines as recipes: values, not only keys."""

from __future__ import annotations

import pytest

from helpers.paths import FIXTURES
from luthier.recipe.recipe import Recipe
from luthier.tools.foreign import trl
from luthier.tools.foreign.convert import check, convert, import_file
from luthier.tools.foreign.read import Written

FOLDER = FIXTURES / "foreign" / "trl"


def imported(name: str) -> Recipe:
    return Recipe.load(import_file(FOLDER / name).recipe)


def notes(name: str) -> dict:
    return {note.key: note for note in import_file(FOLDER / name).notes}


def of(command: str = "", **keys) -> Recipe:
    """A small configuration with further keys, as a recipe."""
    values = {"model_name_or_path": "m", "dataset_name": "a/b", **keys}
    return check(convert(Written(values, command=command), trl))


def test_lora():
    recipe = imported("sft.yaml")
    tuner = recipe.methods()["tuner"]
    assert (tuner.r, tuner.lora_alpha, tuner.lora_dropout) == (32, 16, 0.05)
    assert tuner.target_modules == ["q_proj", "v_proj"]
    assert (recipe.learning_rate, recipe.lr_scheduler_type, recipe.warmup_steps) == (2e-4, "linear", 0)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 16
    assert recipe.data == {"path": "trl-lib/Capybara", "split": "train"}
    assert recipe.eval_data == {"path": "trl-lib/Capybara", "split": "test"}
    assert recipe.eval_steps == 100


def test_a_command_line_on_eight_devices():
    recipe = imported("sft_full.sh")
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 2 * 8 * 8
    assert (recipe.methods()["tuner"].name, recipe.warmup_steps) == ("full", 0.03)
    changed = notes("sft_full.sh")["lr_scheduler_type"]
    assert (recipe.lr_scheduler_type, changed.outcome) == ("cosine", "changed")
    assert recipe.eval_data == "auto"


def test_qlora():
    recipe = imported("qlora.yaml")
    quantizer = recipe.methods()["quantization"]
    assert (quantizer.name, quantizer.double_quant, recipe.dtype) == ("nf4", False, "bfloat16")
    assert recipe.methods()["tuner"].target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert recipe.methods()["architecture"].neftune_noise_alpha == 5
    assert (recipe.data["split"], recipe.eval_data["split"]) == ("train_sft", "test_sft")
    assert (recipe.eval_steps, recipe.max_length) == (0.5, 2048)


@pytest.mark.parametrize(
    ("name", "objective", "settings"),
    [
        ("dpo.yaml", "dpo", {"beta": 0.05}),
        ("kto.sh", "kto", {"desirable_weight": 1.33, "undesirable_weight": 1.0}),
        ("orpo.yaml", "orpo", {"beta": 0.2}),
        ("cpo_simpo.yaml", "simpo", {"beta": 1.5, "simpo_gamma": 0.7}),
        ("reward.yaml", "reward", {"center_rewards_coefficient": 0.01}),
        ("grpo.yaml", "grpo", {"beta": 0.001, "scale_rewards": "none"}),
    ],
)
def test_objectives(name, objective, settings):
    aim = imported(name).aim()
    assert aim.name == objective
    assert {key: getattr(aim, key) for key in settings} == settings


def test_a_sum_of_losses():
    parts = imported("dpo_mpo.yaml").aim().parts
    assert [(weight, term.name) for weight, term in parts] == [
        (0.8, "dpo"),
        (0.2, "bco_pair"),
        (1.0, "chosen_sft"),
    ]


def test_steps_count_instead_of_epochs():
    assert imported("dpo.yaml").max_steps == 1000
    assert notes("dpo.yaml")["num_train_epochs"].outcome == "dropped"


def test_grpo_counts_completions():
    recipe = imported("grpo.yaml")
    rollout = recipe.methods()["online_stages"][0]
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * rollout.n == 8 * 4
    assert (rollout.n, rollout.max_new_tokens) == (8, 512)


def test_a_mixture():
    recipe = imported("mixture.yaml")
    assert recipe.data == [{"path": "trl-lib/tldr", "split": "train"}, {"path": "rows.jsonl"}]
    assert recipe.eval_data == 0.1


def test_arguments_alone():
    recipe = imported("training_args.json")
    optimizer = recipe.methods()["optim"]
    assert (optimizer.weight_decay, optimizer.adam_beta2, optimizer.max_grad_norm) == (0.01, 0.98, 0.3)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.seed) == (3e-5, 0.06, 3)
    assert recipe.aim().label_smoothing_factor == 0.1
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 8
    assert recipe.lr_scheduler_type == "polynomial"


def test_text_of_a_column():
    recipe = imported("text_field.yaml")
    assert (recipe.data["format"], recipe.data["columns"]) == ("text", {"text": "review"})
    assert (recipe.methods()["optim"].name, recipe.methods()["optim"].beta1) == ("lion", 0.95)
    assert recipe.save_steps == 0.25


@pytest.mark.parametrize(("command", "rate"), [("sft", 2e-5), ("dpo", 1e-6), ("reward_modeling", 1e-4)])
def test_each_trainer_has_its_rate(command, rate):
    assert of(command).learning_rate == rate


def test_the_trainer_follows_from_keys():
    assert of(beta=0.1, loss_type="ipo").aim().name == "ipo"
    assert of(num_generations=4, reward_funcs=["accuracy_reward"]).aim().name == "dapo"
    assert of(desirable_weight=1.0).aim().name == "kto"
