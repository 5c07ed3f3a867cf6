"""vllm: an adapter that vLLM reads stays one; what it does not read is merged, and why is told."""

from __future__ import annotations

import pytest

import luthier
from helpers.rows import recipe_of
from luthier.methods.exporters.engines.vllm import smallest_rank, unreadable
from luthier.serve.export import export_form

PLAIN = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"r": 513}, "rank 512"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_vllm_refuses(change, words):
    assert unreadable(PLAIN) is None
    assert words in unreadable(PLAIN | change)


def test_the_smallest_rank_that_vllm_has():
    cases = ((1, {}), (9, {}), (8, {"x": 65}))
    assert [smallest_rank(PLAIN | {"r": r, "rank_pattern": p}) for r, p in cases] == [1, 16, 128]


@pytest.mark.long
def test_what_vllm_does_not_read_is_merged(tiny, tmp_path):
    recipe = recipe_of(tiny) | {"tuner": {"name": "lora", "r": 4}, "max_steps": 2}
    run = luthier.tune(recipe, folder=tmp_path / "run").folder
    done = export_form(run, "vllm", tmp_path / "adapter")
    assert "--max-lora-rank 8" in done.usage[0].code and (tmp_path / "adapter/adapter_config.json").is_file()
    done = export_form(run, {"name": "vllm", "merge": True}, tmp_path / "merged")
    assert done.notes[0].startswith("merged:") and (tmp_path / "merged/model.safetensors").is_file()
    recipe["tuner"] = {"name": "lora", "use_dora": True}
    done = export_form(luthier.tune(recipe, folder=tmp_path / "dora").folder, "vllm", tmp_path / "out")
    assert "DoRA" in done.notes[0] and f"vllm serve {tmp_path / 'out'}" == done.usage[0].code
