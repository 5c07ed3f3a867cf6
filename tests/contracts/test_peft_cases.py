"""luthier's own tuner types in plain PEFT: the cases of PEFT's tests/testing_common.py (PeftCommonTester),
written anew, for every Delta. A case that a type cannot have ends in a sentence of that type.

`make test-peft PEFT=folder` runs PEFT's own file from its sources (tests/contracts/test_peft_sources.py).
"""

from __future__ import annotations

import copy
import sys
import warnings
from functools import lru_cache

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.errors import RecipeError
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft import config_of
from luthier.registry import find, names

DELTAS = [n for n in names("tuner") if issubclass(find("tuner", n), Delta)]
IDS = torch.arange(3, 17).reshape(2, 7)
PLACES = ["q_proj", "v_proj"]
# where a type sits, if not on queries and values, and what a network of this size needs
SETTINGS = {
    "autopeft": {"target_modules": ["k_proj", "down_proj"], "serial": 2, "parallel": 2},
    "prefix": {"target_modules": ["k_proj"], "num_virtual_tokens": 3},
    "apt": {"target_modules": ["o_proj"], "num_virtual_tokens": 3},
    "s2ft": {"target_modules": ["o_proj", "down_proj"], "o_ratio": 0.5, "d_ratio": 0.5},
}
LAYERWISE = ["iaa", "quantized_side"]
SMALL = {"r": 4, "density": 0.1}


@lru_cache
def _network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, attention_bias=True)
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=2)).eval()


def base() -> LlamaForCausalLM:
    return copy.deepcopy(_network())


def config(name: str, **more):
    cls = config_of(find("tuner", name))
    own = set(cls.__dataclass_fields__)
    settings = {k: v for k, v in SMALL.items() if k in own} | {"target_modules": PLACES}
    settings |= SETTINGS.get(name, {})
    if name == "lt_sft":  # as a run saves it: how many entries of each module were chosen
        modules = [n for n, _ in _network().named_modules() if n.endswith(tuple(PLACES))]
        settings["counts"] = dict.fromkeys(modules, 9)
    if name in LAYERWISE:  # as luthier fills in when it attaches: where the first and the last layer end
        ends = [f"model.layers.{i}.mlp.down_proj" for i in more.get("layers_to_transform", (0, 1))]
        settings |= {"target_modules": ["down_proj"], "ends": [ends[0], ends[-1]]}
    if name == "s2ft":  # as luthier fills in when it attaches
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return cls(task_type="CAUSAL_LM", **settings, **more)


def moved(model, adapter: str = "", seed: int = 5):
    """As if trained: the tensors of an adapter, or of all, are somewhere else."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if model.prefix in n and adapter in n:
                p.add_(torch.randn(p.shape, generator=rng) * 0.3)
    return model


def put(name: str, model=None, **how):
    torch.manual_seed(1)
    return moved(get_peft_model(model or base(), config(name), **how)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def merges(name: str) -> bool:
    """False after the type has said that it cannot."""
    if "merge" in find("tuner", name).provides:
        return True
    with pytest.raises(NotImplementedError, match="cannot be merged into them; keep"):
        put(name).merge_and_unload()
    return False


# --- the cases


def case_attributes_and_name(name, folder):
    model = put(name, adapter_name="test-adapter")
    assert all(hasattr(model, a) for a in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert any("test-adapter" in n for n, _ in model.named_parameters())


def case_prepare_for_training(name, folder):
    assert not put(name).get_input_embeddings()(IDS).requires_grad
    model = get_peft_model(prepare_model_for_kbit_training(base()), config(name))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad


def case_low_cpu_mem_usage(name, folder):
    model = put(name)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True).eval()
    again.load_adapter(folder, adapter_name="other", low_cpu_mem_usage=True)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    injected = base()
    inject_adapter_in_model(config(name), injected, low_cpu_mem_usage=True)
    assert "meta" in {p.device.type for p in injected.parameters()}


def case_save_pretrained(name, folder):
    model = put(name)
    model.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base(), folder)
    assert not any("missing adapter keys" in str(w.message) for w in heard)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    there = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= there
    assert not {"model.safetensors", "config.json"} & there


def case_save_pretrained_without_safetensors(name, folder):
    model = put(name)
    model.save_pretrained(folder, safe_serialization=False)
    again = PeftModel.from_pretrained(base(), folder).eval()
    assert torch.equal(logits(again), logits(model))


def case_selected_adapters(name, folder):
    model = put(name)
    model.add_adapter("new_adapter", config(name))
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder)
    again.load_adapter(folder / "new_adapter", "new_adapter")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    model.save_pretrained(folder / "one", selected_adapters=["default"])
    assert list(PeftModel.from_pretrained(base(), folder / "one").peft_config) == ["default"]


def case_names_that_contain_each_other(name, folder):
    model = put(name)
    count = len(get_peft_model_state_dict(model))
    for other in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(other, config(name))
    model.save_pretrained(folder, selected_adapters=["default"])
    assert len(load_file(folder / "adapter_model.safetensors")) == count


def case_config_given_at_load(name, folder):
    put(name).save_pretrained(folder)
    own = config(name)
    again = PeftModel.from_pretrained(base(), folder, is_trainable=False, config=own)
    assert again.peft_config["default"] is own and own.inference_mode


def case_several_adapters_loaded(name, folder):
    put(name).save_pretrained(folder)
    model = PeftModel.from_pretrained(base(), folder)
    for other in ("other", "yet-another"):
        assert model.load_adapter(folder, adapter_name=other).missing_keys == []


def case_merge_half_precision(name, folder):
    if merges(name):
        model = put(name, base().half()).to(torch.float16)
        assert logits(model.merge_and_unload()).isfinite().all()


def case_merge_of_nan_is_refused(name, folder):
    if not merges(name):
        return
    for bad in (torch.nan, torch.inf):
        model = put(name)
        for n, p in model.named_parameters():
            if model.prefix in n:
                p.data[0] = bad
        with pytest.raises(
            ValueError, match="NaNs detected in the merged weights. The adapter default seems"
        ):
            model.merge_and_unload(safe_merge=True)


def case_merge(name, folder):
    if not merges(name):
        return
    model = put(name)
    before = logits(model)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    alone = model.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in alone.modules())
    assert not hasattr(alone, "peft_config")
    assert torch.allclose(merged, before, atol=1e-4) and torch.allclose(logits(alone), before, atol=1e-4)
    assert not torch.allclose(before, logits(base()), atol=1e-4)
    alone.save_pretrained(folder)
    again = LlamaForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits(again), before, atol=1e-4)


def case_merge_of_several(name, folder):
    if not merges(name):
        return
    model = put(name)
    one = logits(model)
    model.add_adapter("adapter-2", config(name))
    model.set_adapter("adapter-2")
    moved(model, "adapter-2", seed=6)
    two = logits(model.eval())
    assert not torch.allclose(one, two, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    second, first = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.allclose(logits(second.merge_and_unload(adapter_names=["adapter-2"])), two, atol=1e-3)
    assert torch.allclose(logits(first.merge_and_unload(adapter_names=["default"])), one, atol=1e-3)
    model.base_model.set_adapter(["default", "adapter-2"])
    active = logits(model)
    both = logits(model.merge_and_unload(adapter_names=["adapter-2", "default"]))
    assert torch.allclose(both, active, atol=1e-3)
    assert not torch.allclose(both, one, atol=1e-3) and not torch.allclose(both, two, atol=1e-3)


def case_merge_twice_is_merge_once(name, folder):
    if not merges(name):
        return
    model = put(name)
    model.merge_adapter()
    once = logits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), once)


def case_safe_merge(name, folder):
    if not merges(name):
        return
    model = put(name)
    tuned = logits(model)
    alone = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(alone), tuned, atol=1e-5)
    assert all(t.is_contiguous() for t in alone.state_dict().values())


def case_generate(name, folder):
    model = put(name)
    out = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False
    )
    assert out.shape[1] > IDS.shape[1]
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, do_sample=False)


def case_generate_in_half_precision(name, folder):
    model = put(name, base().bfloat16()).to(torch.bfloat16)
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, do_sample=False)


def case_training(name, folder):
    model = put(name).train()
    model(IDS).logits.sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (model.prefix in n and p.requires_grad), n


def case_training_and_inference_from_safetensors(name, folder):
    model = put(name)
    model(IDS).logits.sum().backward()
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def case_training_some_layers(name, folder):
    torch.manual_seed(1)
    model = moved(get_peft_model(base(), config(name, layers_to_transform=[0])))
    model(IDS).logits.sum().backward()
    moving = [n for n, p in model.named_parameters() if p.grad is not None]
    assert moving and all(".layers.0." in n for n in moving)
    model.eval().save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def case_gradient_checkpointing(name, folder):
    model = put(name).train()
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for how in (None, False, True):
        if how is not None:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": how})
        torch.manual_seed(0)  # of what a pass draws
        (model(IDS).logits ** 2).sum().backward()
        found.append({n: p.grad for n, p in moving.items()})
        for p in model.parameters():
            p.grad = None
    plain, *checkpointed = found
    for grads in checkpointed:
        assert all(torch.allclose(grads[n], g, rtol=1e-3, atol=1e-4) for n, g in plain.items())


def case_device_map(name, folder):
    model = put(name)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder, device_map={"": "cpu"}).eval()
    assert torch.equal(logits(again), logits(model))


def deleted(name, active: bool):
    model = put(name)
    before = logits(model)
    model.add_adapter("delete_me", config(name))
    if active:
        model.set_adapter("delete_me")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("delete_me")
        assert "delete_me" not in model.peft_config and model.active_adapters == ["default"]
        for m in model.modules():
            if isinstance(m, BaseTunerLayer):
                for attribute in (*m.adapter_layer_names, *m.other_param_names):
                    assert "delete_me" not in getattr(m, attribute)
        assert torch.equal(logits(model.eval()), before)
        model.delete_adapter("default")
    assert not model.peft_config and model.active_adapters == []
    assert torch.equal(model.base_model(IDS).logits, logits(base()))


def case_delete_adapter(name, folder):
    deleted(name, active=True)


def case_delete_inactive_adapter(name, folder):
    deleted(name, active=False)


def case_delete_unknown_adapter(name, folder):
    with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
        put(name).delete_adapter("unknown-adapter")


def case_unload(name, folder):
    model = put(name)
    tuned = logits(model)
    alone = model.unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in alone.modules())
    assert not torch.allclose(tuned, logits(base()), atol=1e-4)
    assert torch.equal(logits(alone), logits(base()))
    assert alone.state_dict().keys() == base().state_dict().keys()


def case_disable_adapter(name, folder):
    model = put(name)
    tuned = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, logits(base()))


def case_input_embeddings(name, folder):
    model = put(name, adapter_name="test-adapter")
    given = model.get_input_embeddings()(IDS)
    assert torch.allclose(model(inputs_embeds=given).logits, logits(model), atol=1e-6)


def case_lora_conversion(name, folder):
    model = put(name)
    if not model.supports_lora_conversion():
        return
    tuned = logits(model)
    lora, state = convert_to_lora(model, rank=8)
    again = get_peft_model(base(), lora).eval()
    assert not set_peft_model_state_dict(again, state).unexpected_keys
    before, after = tuned - logits(base()), logits(again) - logits(base())
    assert (before - after).square().mean() < 0.5 * before.square().mean() + 1e-3


def case_base_model_state_dict(name, folder):
    original = base().state_dict()
    model = get_peft_model(base(), config(name))
    extracted = get_base_model_state_dict(model)
    assert extracted.keys() == original.keys()
    assert all(torch.equal(v, extracted[k]) for k, v in original.items())
    with torch.no_grad():
        for p in model.get_base_model().parameters():
            p.add_(0.1)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, original[k]) for k, v in get_base_model_state_dict(model).items())


CASES = [f for f in vars(sys.modules[__name__]).values() if getattr(f, "__name__", "").startswith("case_")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
@pytest.mark.parametrize("name", DELTAS)
def test_in_plain_peft(name, case, tmp_path):
    case(name, tmp_path)


# --- what a type says where a case is not for it


@pytest.mark.parametrize(
    "name, settings, sentence",
    [
        ("lt_sft", {}, "chooses its entries in the first phase of a run"),
        ("apet", {"n": 40}, "spreads n over all chosen modules"),
        ("spt", {"budget": 40}, "spends its budget over all chosen modules"),
        ("autopeft", {}, "sits on key projections and on the last matrix"),
        ("prefix", {}, "attached to key projections"),
        ("s2ft", {}, "is not one of down, up, gate, o and v"),
    ],
)
def test_what_a_type_says(name, settings, sentence):
    cls = config_of(find("tuner", name))
    with pytest.raises((ValueError, RecipeError), match=sentence) as refusal:
        get_peft_model(base(), cls(task_type="CAUSAL_LM", target_modules=PLACES, **settings))
    assert "\n" not in str(refusal.value)
