"""quantized: what is quantized; transformers words; other networks are read into codes; what was read of a
checkpoint leaves memory.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from helpers.tuners import base, logprobs, put, train
from luthier.errors import RecipeError
from luthier.model.experts import apart, join
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules, open_up
from luthier.model.quantized_load import chosen
from luthier.recipe.recipe import Recipe
from luthier.registry import build


def test_what_is_quantized():
    q = build("quantizer", "nf4")
    found = chosen(base("llama"), q)
    assert len(found) == 14 and "lm_head" not in found
    assert not any("lm_head" in n or "wte" in n for n in chosen(base("gpt2"), q))
    fewer = chosen(base("llama"), build("quantizer", {"name": "nf4", "skip_modules": ["mlp", "layers.0"]}))
    assert fewer and all(".1.self_attn." in n for n in fewer)
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        chosen(base("llama"), build("quantizer", {"name": "nf4", "skip_modules": ["q_prj"]}))


def test_transformers_words():
    read = lambda **given: Recipe.load(given)
    for given, want in [
        ({"load_in_4bit": True}, {"name": "nf4"}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            {"name": "fp4", "double_quant": False},
        ),
        ({"load_in_8bit": True, "load_in_4bit": False}, {"name": "int8"}),
        ({"adapter": "qlora"}, {"name": "nf4"}),
        ({"tuner": {"name": "qlora", "r": 4}, "load_in_8bit": True}, {"name": "int8"}),
        ({"quantization": "int8", "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"}, None),
    ]:
        recipe = read(**given)
        assert recipe.quantization == want and recipe.methods()["tuner"].name == "lora", given
        assert not want or want == "int8" or any("quantiz" in t for t in recipe.warnings)
    assert read(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").dtype == "bfloat16"
    assert Recipe.load(read(load_in_4bit=True).yaml()).fingerprint() == read(load_in_4bit=True).fingerprint()
    assert (
        read(quantization="nf4").but(**{"quantization.block_size": 32}).methods()["quantization"].block_size
        == 32
    )
    for given in (
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_4bit": True, "quantization": "int8"},
    ):
        with pytest.raises(RecipeError, match="keep one of them"):
            read(**given)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mixtral"])
def test_other_networks_are_read_into_codes(kind, tmp_path):
    """Conv1D, a classifier with a fresh head, the fused experts of a mixture, tied embeddings."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    from luthier.model.quantized_load import loaded

    q = build("quantizer", "nf4")
    if kind == "bert":
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97
        )
        torch.manual_seed(0)
        plain, cls = BertForSequenceClassification(config).eval(), AutoModelForSequenceClassification
        plain.bert.save_pretrained(tmp_path)  # no head
    else:
        plain = base(kind)
        cls = type(plain)
        plain.save_pretrained(tmp_path)
    found = {}

    def load(**said):
        model, found["info"] = cls.from_pretrained(tmp_path, output_loading_info=True, **said)
        return model

    ids = torch.arange(3, 17).reshape(2, 7)
    model = loaded(load, q, torch.float32, torch.device("cpu"))
    if kind == "mixtral":
        with torch.no_grad():
            fused = plain(ids).logits
            apart(plain)
            assert torch.allclose(plain(ids).logits, fused, atol=1e-6)
        assert sum(".experts." in n for n in modules(model)) == 2 * sum(
            m.count for m in plain.modules() if hasattr(m, "count")
        )
    missing = {k for k in found["info"]["missing_keys"]}
    assert missing == ({"classifier.weight", "classifier.bias"} if kind == "bert" else set())
    assert type(model.get_submodule("classifier")) is nn.Linear if kind == "bert" else modules(model)
    some = modules(model)
    assert set(some) == set(chosen(plain, q))
    for name, m in some.items():
        W = plain.get_submodule(name).weight.detach()
        want = q.dequantize(q.quantize((W.T if kind == "gpt2" else W).contiguous()), m.size, torch.float32)
        assert torch.equal(m.dense(), want)
    with torch.no_grad():
        for name, m in some.items():
            plain.get_submodule(name).weight.data = m.weight.contiguous()
        if kind != "bert":
            assert torch.allclose(model.eval()(ids).logits, plain(ids).logits, atol=1e-5)
        join(plain)
        open_up(model)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in plain.named_parameters()
        }
        assert (
            all(torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters()) or kind == "bert"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="pages of files are counted on Linux")
def test_what_was_read_of_a_checkpoint_leaves_memory(tmp_path):
    """The file may stay mapped for what is dense, and is all there when it is read again; its pages are not
    kept.
    """
    from luthier.model import quantized_load as _load

    dense = base("llama")
    dense.save_pretrained(tmp_path)
    q = build("quantizer", "nf4")
    model = _load.loaded(
        lambda **said: type(dense).from_pretrained(tmp_path, **said), q, torch.float32, torch.device("cpu")
    )
    file, kept, inside = str(tmp_path / "model.safetensors"), 0, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            inside = line.rstrip().endswith(file) if "-" in line.split()[0] else inside
            kept += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
    assert kept == 0
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters())


def test_some_experts_stay_as_they_are(tmp_path):
    """Skipped by the name of their matrix, whether read from a checkpoint or from a network that is there."""
    from luthier.model.quantized_load import loaded

    q = build("quantizer", {"name": "nf4", "skip_modules": ["down_proj"]})
    dense = base("mixtral")
    dense.save_pretrained(tmp_path)
    read = loaded(
        lambda **said: type(dense).from_pretrained(tmp_path, **said), q, torch.float32, torch.device("cpu")
    )
    quantize(dense, q)
    assert set(modules(read)) == set(modules(dense)) and not any("down_proj" in n for n in modules(read))
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in read.named_parameters())
    assert any(n.endswith("experts.1.down_proj.weight") for n, _ in read.named_parameters())


@torch.no_grad()
def test_tuners_beside_experts_that_are_codes():
    """A Delta moves what it moves beside dense experts; lora leaves the experts out, says so, and says what
    reaches them.
    """
    dense, coded = base("mixtral"), base("mixtral")
    quantize(coded, build("quantizer", "nf4"))
    once = copy.deepcopy(coded)
    assert {s.name for s in put("ssf", dense).param_groups()} == {
        s.name for s in put("ssf", once).param_groups()
    }
    attached = put("lora", coded, target_modules="all-linear")
    assert not any("experts" in s.name for s in attached.param_groups())
    assert any("skip_modules" in t and "fused expert weights" in t for t in attached.warnings)
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    with pytest.raises(RecipeError, match="'experts.down_proj' is quantized"):
        put("lora", copy.deepcopy(once), target_modules=["q_proj"], target_parameters=["experts.down_proj"])
