"""luthier's own tuner types under PEFT's own test file: an optional job, `make test-peft PEFT=folder`, where
the folder is a checkout of github.com/huggingface/peft. tests/contracts/test_peft_cases.py has the same cases
without it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from contracts.test_peft_cases import DELTAS, IDS, base, config, moved
from luthier.methods.tuners._peft import config_of
from luthier.registry import find

SOURCES = os.environ.get("LUTHIER_PEFT", "")
pytestmark = pytest.mark.skipif(not SOURCES, reason="no sources of PEFT here (LUTHIER_PEFT)")
CASES = {  # of PeftCommonTester -> further arguments; the rest are for LoRA, prompts, or several networks
    "model_attr": {},
    "adapter_name": {},
    "prepare_for_training": {},
    "load_model_low_cpu_mem_usage": {},
    "save_pretrained": {},
    "save_pretrained_selected_adapters": {},
    "save_pretrained_adapter_name_substring": {},
    "from_pretrained_config_construction": {},
    "load_multiple_adapters": {},
    "merge_layers_fp16": {},
    "merge_layers_nan": {},
    "merge_layers": {},
    "merge_layers_multi": {},
    "merge_layers_is_idempotent": {},
    "safe_merge": {},
    "generate": {},
    "generate_pos_args": {"raises_err": False},
    "generate_half_prec": {},
    "training": {},
    "inference_safetensors": {},
    "training_layer_indexing": {},
    "training_gradient_checkpointing": {},
    "peft_model_device_map": {},
    "delete_adapter": {},
    "delete_inactive_adapter": {},
    "delete_unknown_adapter_raises": {},
    "unload_adapter": {},
    "disable_adapter": {},
    "lora_conversion": {},
    "get_base_model_state_dict": {},
}


# merged and unmerged they sum in another order, and this case allows 1e-6; `merge_layers` allows 1e-4
ROUNDING = {("pela", "safe_merge"), ("sara", "safe_merge")}


class Network:
    """Stands for a class of transformers: a name is the tiny Llama, a folder is read."""

    @staticmethod
    def from_pretrained(name, dtype=None, **_):
        model = LlamaForCausalLM.from_pretrained(name).eval() if Path(name).is_dir() else base()
        model.config._name_or_path = model.name_or_path = str(name)
        return model if dtype is None else model.to(dtype)


@pytest.fixture(scope="module")
def common():
    """PEFT's testing_common, on networks whose adapters are somewhere else than at their start."""
    package = types.ModuleType("peft_tests")
    package.__path__ = [str(Path(SOURCES) / "tests")]
    sys.modules["peft_tests"] = package
    if importlib.util.find_spec("diffusers") is None:  # imported for networks that are not used here
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = diffusers
    module = importlib.import_module("peft_tests.testing_common")
    plain = module.get_peft_model

    def away(*args, **how):
        model = moved(plain(*args, **how))
        add = model.add_adapter

        def added(adapter, *args, **how):
            add(adapter, *args, **how)
            moved(model, adapter, seed=6)

        model.add_adapter = added
        return model

    module.get_peft_model = away
    return module


def applies(name: str, case: str) -> bool:
    """Whether a case is one of a tuner: what computes beside the weights is neither merged nor converted."""
    return not ("merge" in case or case == "lora_conversion") or "merge" in find("tuner", name).provides


@pytest.mark.parametrize("name, case", [(n, c) for n in DELTAS for c in CASES if applies(n, c)])
def test_peft_case(name, case, common):
    class Tester(common.PeftCommonTester):
        transformers_class = Network

        def prepare_inputs_for_testing(self):
            return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

    if (name, case) in ROUNDING:
        pytest.xfail("rounding")
    own = config(name)
    settings = {"task_type": own.task_type} | {
        k: v for k, v in own.to_dict().items() if k in find("tuner", name).__dataclass_fields__
    }
    settings.pop("layers_to_transform", None)
    getattr(Tester(), f"_test_{case}")("tiny", config_of(find("tuner", name)), settings, **CASES[case])
