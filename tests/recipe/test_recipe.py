"""Recipes: what is understood, and forty that are refused, each with its sentence, before any compute."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from helpers.rows import PAIRS, SUMS, UNPAIRED
from luthier.data.load import load_data
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.stages.select.best import Best
from luthier.recipe.recipe import Recipe, terms
from luthier.recipe.validate import validate
from luthier.registry import build, find

ROLLOUT, SCORE = {"name": "rollout", "n": 4}, {"name": "score", "reward": "exact_match"}


def refused(recipe, rows=SUMS) -> str:
    with pytest.raises(RecipeError) as told:
        made = Recipe.load(recipe)
        validate(made, load(rows, max_bad_rows=1).rows)
    return str(told.value)


# what is wrong, and what the sentence must say: where, what was meant, what to do
WRONG = [
    ({"learning_rat": 1e-4}, ["no key 'learning_rat'", "'learning_rate'"]),
    ({"tunr": "lora"}, ["no key 'tunr'", "'tuner'"]),
    ({"tuner": "lroa"}, ["no tuner 'lroa'", "'lora'"]),
    ({"tuner": "qzx"}, ["no tuner 'qzx'"]),
    ({"objective": "dop"}, ["no objective 'dop'", "'dpo'"]),
    ({"optim": "adamz"}, ["no optimizer 'adamz'", "'adamw'"]),
    ({"estimator": "backprob"}, ["no estimator 'backprob'", "'backprop'"]),
    ({"transforms": ["adan"]}, ["no transform 'adan'", "'adam'"]),
    ({"stages": ["idf"]}, ["no stage 'idf'", "'ifd'"]),
    ({"evaluate": ["los"]}, ["no evaluator 'los'", "'loss'"]),
    ({"plan": "rafft"}, ["no plan 'rafft'", "'raft'"]),
    ({"architecture": "casual"}, ["no architecture 'casual'", "'causal'"]),
    ({"tuner": {"name": "lora", "rr": 4}}, ["tuner 'lora' has no setting 'rr'", "'r'"]),
    ({"tuner": {"name": "lora", "r": "big"}}, ["tuner 'lora': r", "integer", "'big'"]),
    ({"tuner": {"name": "lora", "r": -3}}, ["r", "-3"]),
    ({"tuner": {"r": 4}}, ["tuner", "name"]),
    ({"tuner": 7}, ["tuner", "7"]),
    ({"objective": {"name": "dpo", "beta": "hot"}}, ["objective 'dpo': beta", "'hot'"]),
    ({"objective": "dpo & sft"}, ["'dpo & sft'", "dpo + 0.1*sft"]),
    ({"objective": "0.5*"}, ["0.5*"]),
    ({"learning_rate": "fast"}, ["learning_rate", "number", "'fast'"]),
    ({"learning_rate": -1}, ["learning_rate", "greater than or equal to 0"]),
    ({"max_steps": 2.5}, ["max_steps", "2.5"]),
    ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size", "greater than or equal to 1"]),
    ({"num_train_epochs": 0}, ["num_train_epochs", "greater than 0"]),
    ({"dtype": "float8"}, ["dtype", "bfloat16", "'float8'"]),
    ({"max_bad_rows": 5}, ["max_bad_rows", "less than or equal to 1"]),
    ({"model": "/no/such/model"}, ["folder /no/such/model does not exist"]),
    ({"model": "toy:ml"}, ["ml", "lm"]),
    ({"lr_scheduler_type": "cosin"}, ["no schedule is named 'cosin'", "'cosine'"]),
    ({"lr": 1e-3, "learning_rate": 1e-3}, ["same key"]),
    ({"warp_speed": 9}, ["no key 'warp_speed'"]),
    ({"objective": "dpo"}, ["objective 'dpo' requires", "prompt/chosen/rejected"]),
    ({"objective": "distill"}, ["'distill' requires a teacher", "roles: {teacher"]),
    (
        {"objective": "grpo"},
        ["'grpo' requires completions that the policy itself has just sampled", "rollout", "online_stages"],
    ),
    (
        {"objective": "grpo", "live": [ROLLOUT]},
        ["'grpo' requires a score for each completion", "stage 'score'"],
    ),
    (
        {"objective": "grpo", "stages": [ROLLOUT, SCORE]},
        ["fresh samples", "from `stages` to `online_stages`"],
    ),
    (
        {"objective": "grpo", "live": [ROLLOUT, SCORE], "estimator": "mezo"},
        ["'mezo' compares loss values", "the same for every policy", "old: true"],
    ),
    ({"objective": "dpo", "stages": [ROLLOUT, SCORE, "best"]}, ["'dpo' requires", "different score"]),
    ({"objective": "kto"}, ["'kto' requires a score"]),
    (
        {"tuner": "full", "roles": {"reference": "off"}, "objective": "sft + 0.1*kl"},
        ["role 'base' requires a tuner that can be disabled", "initial"],
    ),
    ({"roles": {"reference": "of"}}, ["no role 'of'", "base"]),
    ({"live": [{"name": "score", "reward": "exat_match"}]}, ["no reward 'exat_match'", "'exact_match'"]),
    ({"live": [{"name": "score", "reward": "python_tests"}]}, ["`tests`"]),
    ({"plan": [{"objective": "sft"}, {"objective": "dpo"}]}, ["'dpo' requires", "different score"]),
    ({"plan": [{"objective": "sft"}, {"tuner": "lorra"}]}, ["no tuner 'lorra'"]),
    ({"report_to": ["tensorbord"]}, ["no tracker named 'tensorbord'", "'tensorboard'"]),
    ({"report_to": ["clearml"]}, ["'clearml' is not installed", "pip install clearml"]),
    ({"adapter": "qloar"}, ["no tuner 'qloar'"]),
    ({"finetuning_type": "freeze"}, ["no tuner 'freeze'"]),
    ({"load_in_4bit": True, "tuner": "full"}, ["makes untrainable"]),
    ({"start": {"merge": "averag", "of": ["a"]}}, ["no merger 'averag'", "'average'"]),
]


@pytest.mark.parametrize("recipe, words", WRONG, ids=lambda x: str(x)[:60] if isinstance(x, dict) else "")
def test_wrong_recipes_get_a_sentence(recipe, words, tiny):
    said = refused({"model": tiny} | recipe)
    assert "\n" not in said and all(w in said for w in words), said


def test_there_are_forty_of_them():
    assert len(WRONG) >= 40


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: [", ["line", "invalid YAML"]),
        ("- a\n- b\n", ["a mapping of `key: value`"]),
        ("just words\n", ["a mapping of `key: value`"]),
        ("no/such/file.yaml", ["does not exist"]),
    ],
)
def test_wrong_files_get_a_sentence(text, words):
    said = str(pytest.raises(RecipeError, Recipe.load, text).value)
    assert all(w in said for w in words), said


def test_a_recipe_may_be_legal(tiny):
    for recipe, rows in (
        ({}, SUMS),
        ({"objective": "dpo + 0.1*chosen_sft"}, PAIRS),
        ({"objective": "dpo", "tuner": "full"}, PAIRS),  # the start plays the reference
        ({"objective": "kto"}, UNPAIRED),
        ({"objective": "grpo", "live": [ROLLOUT, SCORE]}, SUMS),
        ({"objective": "dpo", "stages": [ROLLOUT, SCORE, "pairs"]}, SUMS),
        ({"estimator": "mezo", "tuner": "prompt"}, SUMS),
        (
            {
                "plan": [
                    {"objective": "sft"},
                    {"plan": {"name": "spin", "rounds": 2}},
                    {"start": {"merge": "average", "of": "all"}, "evaluate": ["loss"]},
                ]
            },
            SUMS,
        ),
    ):
        validate(Recipe.load({"model": tiny} | recipe), load(rows).rows)


def test_words_of_other_tools_are_understood_and_told():
    made = Recipe.load(
        {
            "base_model": "toy:lm",
            "micro_batch_size": 2,
            "lora_rank": 4,
            "lora_alpha": 8,
            "cutoff_len": 99,
            "bf16": True,
            "adapter": "lora",
            "weight_decay": 0.1,
            "lora_target_modules": ["q_proj"],
            "epochs": 2,
            "adam_beta2": 0.95,
        }
    )
    assert (made.model, made.per_device_train_batch_size, made.max_length, made.dtype) == (
        "toy:lm",
        2,
        99,
        "bfloat16",
    )
    parts = made.methods()
    assert (parts["tuner"].r, parts["tuner"].lora_alpha, parts["tuner"].target_modules) == (4, 8, ["q_proj"])
    assert (parts["optim"].weight_decay, parts["optim"].adam_beta2, made.num_train_epochs) == (0.1, 0.95, 2)
    assert (
        "'base_model' is read as 'model'" in made.warnings and "'lora_rank' is read as 'r'" in made.warnings
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("dora", {"name": "lora", "use_dora": True}),
        ({"name": "dora", "r": 8}, {"name": "lora", "use_dora": True, "r": 8}),
        ("vera", {"name": "peft", "type": "vera"}),
        ({"name": "vera", "r": 64}, {"name": "peft", "type": "vera", "config": {"r": 64}}),
        ({"name": "prompt_tuning", "num_virtual_tokens": 4}, {"name": "prompt", "num_virtual_tokens": 4}),
    ],
)
def test_tuners_under_other_names_keep_their_settings(theirs, ours):
    assert Recipe.load({"tuner": theirs}).tuner == ours


def test_settings_of_a_tuner_under_another_name_may_come_from_the_command_line():
    assert Recipe.load(None, ["tuner=dora", "tuner.r=8"]).tuner == {"name": "lora", "use_dora": True, "r": 8}


def test_keys_of_training_arguments_are_recognised():
    with pytest.raises(RecipeError, match="no key 'deepspeed'; it is one of transformers' TrainingArguments"):
        Recipe.load({"deepspeed": "zero2.json"})
    with pytest.raises(RecipeError, match="no key 'sede'; did you mean 'seed'"):
        Recipe.load({"sede": 1})


def test_other_words_for_numbers_and_optimizers():
    recipe = Recipe.load({"dtype": "bf16", "optim": "paged_adamw_32bit", "quantization": "4bit"})
    assert (recipe.dtype, recipe.optim, recipe.quantization) == ("bfloat16", "adamw", "nf4")
    assert Recipe.load({"dtype": "torch.float16"}).dtype == "float16"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("tuner", "LoRA", "did you mean 'lora'?"),
        ("objective", "DPO", "did you mean 'dpo'?"),
        ("tuner", "galore", "'galore' is the name of a method of another kind (transform)"),
        ("tuner", "lorra", "did you mean 'lora'?"),
    ],
)
def test_what_a_name_that_is_none_may_mean(kind, name, words):
    with pytest.raises(RecipeError) as error:
        find(kind, name)
    assert words in str(error.value)


def test_precision_said_twice_is_said_once():
    assert (
        Recipe.load({"bf16": True, "fp16": False}).dtype == "bfloat16"
        and Recipe.load({"bf16": False, "fp16": True}).dtype == "float16"
    )
    assert Recipe.load({"bf16": False, "fp16": False}).dtype == Recipe.load({"bf16": False}).dtype == "auto"
    assert "same key" in str(pytest.raises(RecipeError, Recipe.load, {"bf16": True, "fp16": True}).value)


def test_stages_that_ask_no_model_are_tried_on_two_rows(monkeypatch):
    """What a stage does to rows counts, not what it says; and its mistakes come to light before a model is
    loaded.
    """
    recipe = {"objective": "kto", "stages": ["best"]}
    seen = []

    def putting(made):
        monkeypatch.setattr(
            Best, "__call__", lambda self, rows, roles: seen.append(len(rows)) or [made(r) for r in rows]
        )

    rows = load(UNPAIRED).rows
    validate(Recipe.load(recipe), rows)
    putting(lambda row: {k: v for k, v in row.items() if k != "scores"})
    with pytest.raises(RecipeError, match="'kto' requires a score for each completion"):
        validate(Recipe.load(recipe), rows)
    putting(lambda row: row["nothing"])
    with pytest.raises(RecipeError, match="stage 'best' fails on the first rows: KeyError: 'nothing'"):
        validate(Recipe.load(recipe), rows)
    assert seen == [2, 2]
    with pytest.raises(RecipeError, match="'dpo' requires rows with at least two completions"):
        validate(Recipe.load({"objective": "dpo", "stages": [ROLLOUT, SCORE, "best"]}), load(SUMS).rows)


def test_changes_and_origins():
    made = Recipe.load(
        "model: toy:lm\ntuner: lora\n",
        ["tuner.r=4", "learning_rate=3e-5", "objective.name=dpo", "objective.beta=0.2"],
    )
    assert made.methods()["tuner"].r == 4 and made.learning_rate == 3e-5 and made.aim().beta == 0.2
    assert (
        made.origins["model"] == "yaml"
        and made.origins["learning_rate"] == "command line"
        and made.origins["seed"] == "default"
    )
    assert "'learning_rat'" in str(pytest.raises(RecipeError, Recipe.load, {}, ["learning_rat=1"]).value)
    assert "not of the form key=value" in str(
        pytest.raises(RecipeError, Recipe.load, {}, ["learning_rate"]).value
    )


def test_written_back_in_full_and_read_again():
    made = Recipe.load(
        {"tuner": {"name": "lora", "r": 4}, "objective": "dpo + 0.1*chosen_sft", "estimator": "sam"}
    )
    text = made.yaml()
    again = Recipe.load(text)
    assert again.yaml() == text and again.fingerprint() == made.fingerprint()
    plain = yaml.safe_load(text)
    assert plain["tuner"]["r"] == 4 and plain["tuner"]["lora_alpha"] and plain["optim"]["adam_beta1"] == 0.9
    assert Recipe.load({"tuner": {"name": "lora", "r": 8}}).fingerprint() != made.fingerprint()
    assert made.but(output_dir="elsewhere").fingerprint() == made.fingerprint()


def test_no_more_than_fifty_public_keys():
    assert 30 <= len(Recipe.load().public()) <= 50


def test_sums_of_objectives():
    made = terms("dpo + 0.1*chosen_sft + 2e-1*kl")
    assert [(w, o.name) for w, o in made.terms()] == [(1.0, "dpo"), (0.1, "chosen_sft"), (0.2, "kl")]
    assert terms("sft").name == "sft" and terms([{"name": "dpo", "beta": 0.3}]).beta == 0.3
    assert build("objective", terms("sft")) == terms("sft")


def test_paths_are_read_as_text(tmp_path):
    made = Recipe.load({"data": {"path": tmp_path / "rows.jsonl"}, "output_dir": tmp_path})
    assert made.output_dir == str(tmp_path) and str(tmp_path / "rows.jsonl") in str(made.data)


def test_data_with_an_endless_name_is_one_sentence():
    for key in ("data", "eval_data"):
        keys = {"model": "toy:lm-small", "data": "toy:arithmetic"} | {key: "a" * 5000}
        with pytest.raises(RecipeError, match="does not exist"):
            load_data(Recipe.load(keys))


@pytest.mark.parametrize("key", ["model", "output_dir", "init_from", "chat_template"])
def test_a_path_that_the_system_refuses_is_one_sentence(key):
    keys = {"model": "toy:lm-small", "data": "toy:arithmetic"} | {key: "a" * 5000}
    with pytest.raises(RecipeError, match=rf"^{key}: a+\.\.\. cannot be read \(File name too long\)"):
        validate(Recipe.load(keys))


@pytest.mark.parametrize("changes", [{"objective": "0.5*sft + 1..2*dpo"}, {"stages": -1.0, "r": 2}])
def test_what_is_no_sum_and_no_list_is_one_sentence(changes):
    with pytest.raises(RecipeError, match="^(objective: '0|recipe: stages: input should be a valid list)"):
        validate(Recipe.load({"model": "toy:lm-small", "data": "toy:arithmetic", **changes}))


def test_a_misplaced_setting_names_its_owners_and_a_misspelt_one_imports_no_method():
    code = (
        "import sys\n"
        "from luthier.errors import RecipeError\n"
        "from luthier.recipe.recipe import Recipe\n"
        "try: Recipe.load({'model': 'm', 'tuner': 'full', sys.argv[1]: 0.5})\n"
        "except RecipeError as why: print(why)\n"
        "print(*[m for m in sys.modules if m.startswith('luthier.methods.estimators.')])"
    )
    misplaced = python("-c", code, "rho").splitlines()
    assert misplaced[0].startswith("a recipe has no key 'rho'; it is a setting of estimator")
    misspelt = python("-c", code, "rhoo").splitlines()
    assert misspelt[0].startswith("a recipe has no key 'rhoo'") and "sharpness" not in misspelt[1]


def python(*arguments: str) -> str:
    """What another Python prints."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
