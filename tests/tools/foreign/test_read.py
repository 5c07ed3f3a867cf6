"""Scripts with variables, accelerate's files, and what stands where a number is expected."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from helpers.paths import FIXTURES
from luthier.errors import RecipeError
from luthier.tools.foreign.convert import TOOLS, convert, import_file, recognise
from luthier.tools.foreign.read import read_configuration

SCRIPT = """
# nproc=99
nproc=8
export LENGTH=1024
{command} \\
    --model Qwen/Qwen3-0.6B --tuner_type lora --dataset rows.jsonl --torch_dtype bfloat16 \\
    --per_device_train_batch_size 1 --max_length $LENGTH \\
    --gradient_accumulation_steps $(expr 32 / $nproc / 2)
"""


@pytest.mark.parametrize("command", ["swift sft", "deepspeed --hostfile=host.txt swift/cli/sft.py"])
def test_a_script_may_set_variables_and_compute(command, tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT.format(command=command))
    imported = import_file(path)
    assert imported.tool == "ms-swift" and not imported.of("unknown")
    assert imported.recipe["max_length"] == 1024
    assert imported.recipe["gradient_accumulation_steps"] == 2


def test_a_script_of_megatron(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(
        "NPROC_PER_NODE=2 megatron sft --model Qwen/Qwen3-0.6B --dataset rows.jsonl --lr 1e-4 --min_lr 1e-5"
        " --micro_batch_size 2 --global_batch_size 16 --lr_warmup_fraction 0.05 --train_iters 30"
        " --tensor_model_parallel_size 2 --recompute_granularity full --no_save_optim true"
    )
    imported = import_file(path)
    assert not imported.of("unknown")
    recipe = imported.recipe
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 16
    assert (recipe["learning_rate"], recipe["max_steps"]) == (1e-4, 30)


def test_a_variable_from_outside_is_no_number(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text("swift sft --model Qwen/Qwen3-0.6B --dataset rows.jsonl --max_length $LENGTH")
    with pytest.raises(RecipeError, match="LENGTH"):
        import_file(path)


def test_a_configuration_of_accelerate_is_none_of_training(tmp_path):
    path = tmp_path / "fsdp.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 2\n")
    with pytest.raises(RecipeError, match="accelerate"):
        import_file(path)


def test_version_1_of_llama_factory(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(
        "model: Qwen/Qwen3-4B\nmodel_class: llm\npeft_config: {name: lora, r: 16, lora_alpha: 32}\n"
        "dist_config: {name: fsdp2}\ntrain_dataset: data/v1_sft_demo.yaml\nmicro_batch_size: 1\n"
        "cutoff_len: 2048\nlearning_rate: 1.0e-4\nmax_steps: 10\n"
    )
    imported = import_file(path)
    assert imported.tool == "LLaMA-Factory" and not imported.of("unknown")
    assert imported.recipe["tuner"]["r"] == 16 and imported.recipe["max_steps"] == 10


def test_orthogonal_tuning_of_llama_factory(tmp_path):
    path = tmp_path / "oft.yaml"
    path.write_text(
        "model_name_or_path: Qwen/Qwen3-4B\nstage: sft\nfinetuning_type: oft\noft_block_size: 32\n"
        "oft_target: all\ndataset: alpaca_en_demo\ntemplate: qwen3\n"
    )
    assert import_file(path).recipe["tuner"] == {
        "name": "peft",
        "type": "oft",
        "config": {"oft_block_size": 32},
    }


def test_a_process_reward_model_of_axolotl(tmp_path):
    path = tmp_path / "prm.yaml"
    path.write_text(
        "base_model: Qwen/Qwen2.5-3B\nprocess_reward_model: true\nsequence_len: 2048\nmicro_batch_size: 8\n"
        "datasets:\n  - {path: trl-lib/math_shepherd, type: stepwise_supervised}\nnum_epochs: 1\n"
    )
    recipe = import_file(path).recipe
    assert recipe["objective"] == "process_reward" and recipe["stages"] == ["mark_steps"]


ODD = ([], {}, "{", -1, 0, float("nan"), float("inf"), {"a": {}}, [{}], True, [None], 3.5)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_an_odd_value_under_any_key_is_a_recipe_or_a_sentence(tool):
    for number, path in enumerate(sorted((FIXTURES / "foreign" / tool).iterdir())):
        written = read_configuration(path)
        if not written.command:
            written = replace(written, command=path.stem)
        module = TOOLS[written.tool or recognise(written.values, path)]
        for i, key in enumerate(written.values):
            for value in (ODD[(number + i) % len(ODD)], ODD[(number + 7 * i + 3) % len(ODD)]):
                with suppress(RecipeError):
                    convert(replace(written, values={**written.values, key: value}), module)


def test_settings_as_json_text_that_is_none(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nlr_scheduler_kwargs: '{min_lr'\n")
    with pytest.raises(RecipeError, match="'{min_lr' stands where"):
        import_file(path, "trl")
