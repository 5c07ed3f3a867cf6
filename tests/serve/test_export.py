"""export: merged is a plain model; a fresh process loads the export without luthier."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

import luthier
from helpers.rows import recipe_of
from helpers.tuners import LOAD, base, plain, put, run_fresh, train
from luthier.errors import RecipeError, Refused
from luthier.kernels.tolerance import logprob_tolerance, magnitude
from luthier.serve.export import export


@torch.no_grad()
def test_export_merged_is_a_plain_model(tmp_path):
    for name, kind in (("lora", "llama"), ("ssf", "gpt2"), ("lora", "gpt2")):
        attached = put(name, base(kind))
        with torch.enable_grad():
            train(attached)
        attached.export_merged(tmp_path / f"{name}-{kind}")
        again = type(attached.model).from_pretrained(tmp_path / f"{name}-{kind}").eval()
        assert torch.allclose(plain(again), plain(attached.model), atol=2e-5)
    with pytest.raises(RecipeError, match="has no parameter for"):  # a bias that Mixtral cannot have
        put("ssf", base("mixtral"), target_modules=["q_proj"]).export_merged(tmp_path / "refused")
    where = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    attached = put("lora", base("mixtral"), **where, modules_to_save=["lm_head"])
    with torch.enable_grad():
        train(attached)
    attached.export_merged(tmp_path / "moe")
    assert torch.allclose(
        plain(MixtralForCausalLM.from_pretrained(tmp_path / "moe").eval()), plain(attached.model), atol=2e-5
    )


@pytest.mark.long
def test_a_fresh_process_loads_the_export_without_luthier(tmp_path):
    base().save_pretrained(tmp_path / "base")
    attached = train(put("lora_sb"))
    attached.export_lora(tmp_path / "adapter")
    load = LOAD.format(
        base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "out")
    )
    run_fresh(load + "import sys; assert not any(m.startswith('luthier') for m in sys.modules)")
    assert torch.allclose(torch.load(tmp_path / "out"), plain(attached.model), atol=1e-5)


def test_what_rounding_may_change_grows_with_the_log_probabilities():
    assert magnitude(None) == magnitude(-torch.full((4,), 9.0)) == 1.0
    assert magnitude(-torch.full((4,), 25.0)) == 2.5
    model = torch.nn.Linear(2, 2).bfloat16()
    assert logprob_tolerance(model, -torch.full((4,), 20.0)) == 2 * logprob_tolerance(model)


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory) -> str:
    """A base whose end of sequence is not the end of a turn."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tuned(base: str, folder, **keys) -> str:
    """A short run on conversations."""
    rows = []
    for i in range(16):
        turns = [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": str(i + 1)}]
        rows.append({"messages": turns})
    recipe = recipe_of(base) | {"data": rows, "chat_template": "chatml", "max_steps": 3} | keys
    return luthier.tune(recipe, folder=folder).folder


def config_of(folder, name="config.json") -> dict:
    return json.loads((Path(folder) / name).read_text())


@pytest.mark.long
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_configs_are_the_bases_but_for_what_tuning_meant(chatty, tmp_path, tuner):
    """And the model stops where a chat with it does; the run folder of a whole model too."""
    base = Path(shutil.copytree(chatty, tmp_path / "base"))
    before = config_of(base)
    run = tuned(str(base), tmp_path / "run", tuner=tuner)
    sentence = export(run, "merged", tmp_path / "merged")
    assert "tuning changed them by" in sentence
    loaded = luthier.load(run)
    for folder in [tmp_path / "merged", *([Path(run)] if tuner == "full" else [])]:
        assert config_of(folder) == before
        ends = config_of(folder, "generation_config.json")["eos_token_id"]
        assert {*loaded.roles.renderer.stop_ids} <= {*(ends if isinstance(ends, list) else [ends])}


@pytest.mark.long
def test_an_adapter_ends_its_turns(chatty, tmp_path):
    run = tuned(chatty, tmp_path / "run", tuner="lora")
    export(run, "lora", tmp_path / "adapter")
    stop = luthier.load(run).roles.renderer.stop_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token_id == stop[-1]


@pytest.mark.long
def test_the_precision_is_the_runs_unless_asked(chatty, tmp_path):
    """A base in bfloat16, tuned in float32: rounding its small changes away is refused, or told."""
    base = Path(shutil.copytree(chatty, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    run = tuned(str(base), tmp_path / "run", tuner="full", dtype="float32", learning_rate=1e-5)
    export(run, "merged", tmp_path / "merged")
    assert config_of(tmp_path / "merged")["dtype"] == "float32"
    moved = luthier.load(run).model.state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(moved[name], written[name]) for name in written)
    export(run, "merged", tmp_path / "half", "bfloat16")
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    recipe = Path(run) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dtype: float32", "dtype: bfloat16"))
    with pytest.raises(Refused, match="--dtype float32"):
        export(run, "merged", tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    with pytest.raises(RecipeError, match="float16"):
        export(run, "merged", tmp_path / "odd", "int3")


@pytest.mark.long
def test_an_unfinished_run_is_told(tiny, tmp_path):
    luthier.tune(recipe_of(tiny) | {"tuner": "lora"}, folder=tmp_path / "run", stop_at=3)
    assert "is not finished" in export(tmp_path / "run", "merged", tmp_path / "merged")


def test_weights_that_are_missing_are_refused(tiny, tmp_path):
    """All but a head's, which is what tuning is for."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    gone = next(name for name in weights if "mlp" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="mlp") as error:
        luthier.tune(recipe_of(str(base)), folder=tmp_path / "run")
    assert error.value.code == "incomplete_model"
    rows = [{"text": f"{i}", "label": i % 2} for i in range(16)]
    luthier.tune(
        recipe_of(tiny) | {"data": rows, "architecture": "classifier"},
        folder=tmp_path / "head",
    )


def test_a_rounded_form_must_be_the_model_but_for_its_rounding(chatty, tmp_path):
    """A weight that is another one is refused, and so are settings that are others, whatever the rounding."""
    from luthier.methods.exporters._base import Limits
    from luthier.serve.agreement import Probe

    loaded = luthier.load(chatty, dtype="float32")
    probe = Probe.of(loaded)
    form = luthier.load(chatty, dtype="float32")
    agreement = probe.check_rounded(form, Path(chatty), "x", Limits(weights=1e-6))
    assert agreement.weights == 0 and agreement.same == agreement.tokens > 0
    with torch.no_grad():
        form.model.model.layers[1].mlp.up_proj.weight[0] += 0.1
    with pytest.raises(Refused, match="up_proj"):
        probe.check_rounded(form, Path(chatty), "x", Limits(weights=1e-2))
    form.model.model.layers[0].self_attn.scaling *= 1.5
    with pytest.raises(Refused, match="settings and tokenizer"):
        probe.check_rounded(form, Path(chatty), "x", Limits(weights=1e-2))


@pytest.mark.long
def test_the_card_has_the_bases_licence_and_how_the_form_is_used(chatty, tmp_path):
    base = Path(shutil.copytree(chatty, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: odd\n---\n# x\n")
    (base / "LICENSE").write_text("Ask first.")
    run = tuned(str(base), tmp_path / "run", tuner="lora")
    export(run, "lora", tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "license: other\nlicense_name: odd" in card and "library_name: peft" in card
    assert "log-probabilities differ by" in card
    assert 'from_pretrained("FOLDER")' in card and str(tmp_path) not in card
    assert (tmp_path / "adapter/LICENSE").read_text() == "Ask first."


@pytest.mark.long
def test_earlier_versions_of_transformers_find_the_frequencies(chatty, tmp_path):
    """A base that was saved by transformers 4 has them elsewhere; without them, 4 takes its default."""
    base = Path(shutil.copytree(chatty, tmp_path / "base"))
    config = config_of(base)
    del config["rope_parameters"]
    config |= {"rope_theta": 5e5, "rope_scaling": None}
    (base / "config.json").write_text(json.dumps(config))
    run = tuned(str(base), tmp_path / "run", tuner="lora")
    export(run, "merged", tmp_path / "merged")
    written = config_of(tmp_path / "merged")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert network.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
