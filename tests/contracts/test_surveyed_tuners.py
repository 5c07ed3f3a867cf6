"""What docs/tuners.md says is there: each line's tuner is attached, moves something, and merges exactly where
it says that it merges.
"""

from __future__ import annotations

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.paths import ROOT
from luthier.errors import RecipeError
from luthier.methods.transforms.scaling.lora_plus import LoraPlus
from luthier.methods.tuners._base import ParamGroup
from luthier.model.quantized import quantize
from luthier.registry import build, find, provides_of

PAGE = (ROOT / "docs" / "tuners.md").read_text(encoding="utf-8")


LINES = [
    [c.strip() for c in line.strip("| \n").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ")
][2:]


CODE = [
    (line[0], yaml.safe_load(code)["tuner"], yaml.safe_load(base)["quantization"] if base else None)
    for line in LINES
    for code, base in re.findall(r"`(tuner: [^`]+)`(?: on `(quantization: [^`]+)`)?", line[2])
]


IDS = torch.arange(3, 17).reshape(2, 7)


SMALL = {"r": 4, "num_virtual_tokens": 3, "init_rows": 2, "n_layers": 1, "parallel": 4, "serial": 4}


SHAPE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def network(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SHAPE)).eval()
    if kind == "vit":
        shape = {k: v for k, v in SHAPE.items() if k != "vocab_size"}
        return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)).eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.15)).eval()


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(
            torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            if "ViT" in type(model).__name__
            else IDS
        ).logits


def put(spec, kind: str = "llama", base=None):
    spec = {"name": spec} if isinstance(spec, str) else spec
    own = {f.name for f in fields(find("tuner", spec["name"]))}
    torch.manual_seed(1)
    return build("tuner", {**{k: v for k, v in SMALL.items() if k in own}, **spec}).attach(
        on(network(kind), base)
    )


def on(model: torch.nn.Module, base) -> torch.nn.Module:
    if base is not None:
        quantize(model, build("quantizer", base))
    return model


def moved(attached):
    with torch.no_grad():
        for p in attached.parameters().values():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    return attached


def test_the_page_is_read():
    assert len(LINES) > 60 and len({name for name, _, _ in CODE}) > 45
    assert all(
        line[1]
        in {"additive", "prompt", "selective", "reparameterised", "hybrid", "mixture", "quantized", "memory"}
        for line in LINES
    )
    missing = [
        line[0] for line in LINES if not line[2].startswith("`") and not line[2].startswith("not here")
    ]
    assert not missing, "a line is code, or says that it is not here"


@pytest.mark.parametrize("name, spec, base", CODE, ids=lambda x: x if isinstance(x, str) else "")
def test_named(name, spec, base):
    """Attached as the page says; merged or refused as its declaration says."""
    try:
        attached = moved(put(spec, base=base))
    except RecipeError as error:  # biases, which this network has not
        assert "bias" in str(error), error
        attached = moved(put(spec, "bert"))
    assert attached.param_groups()
    tuned = answer(attached.model)
    if "merge" in provides_of(attached.settings):
        with attached.merged() as merged:
            assert torch.allclose(answer(merged), tuned, atol=1e-4)
    else:
        with pytest.raises(RecipeError, match="cannot be merged"), attached.merged():
            pass


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
@pytest.mark.parametrize("spec", ["lora", "houlsby", "ia3", "ssf", "lt_sft", "full", "prefix", "autopeft"])
def test_every_category_on_every_kind_of_network(kind, spec):
    """Selective, additive, reparameterised, prompt and hybrid: something moves, and it changes what the
    network says.
    """
    untuned = answer(network(kind))
    attached = moved(put(spec, kind))
    assert attached.param_groups() and not torch.equal(answer(attached.model), untuned)


def test_counts_are_the_formulas():
    """Of the fourteen matrices of two layers: numbers that move, by hand."""
    size = lambda spec: sum(p.numel() for p in put(spec).parameters().values() if p.requires_grad)
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2
    assert size({"name": "lora", "r": 4}) == sum(4 * (a + b) for a, b in shapes)
    assert size("ssf") == sum(2 * a for a, _ in shapes)
    assert size("ia3") == 2 * (16 + 16 + 64)
    assert size("full") == sum(p.numel() for p in network("llama").parameters())
    assert size({"name": "prefix", "num_virtual_tokens": 3}) == 2 * 3 * (16 + 16)


def test_b_learns_faster():
    """LoRA+: the update of B times its ratio, that of A and of everything else as it is."""
    grads = {"A": torch.ones(2, 3), "B": torch.ones(4, 2), "weight": torch.ones(3)}
    out = LoraPlus(loraplus_lr_ratio=8.0).apply(
        dict(grads), {}, ParamGroup("layer", {}, SimpleNamespace()), 1
    )
    assert torch.equal(out["B"], 8 * grads["B"]) and all(
        torch.equal(out[k], grads[k]) for k in ("A", "weight")
    )
    with pytest.raises(RecipeError, match="finds no LoRA factor B"):
        LoraPlus().bind(put("ssf"))
