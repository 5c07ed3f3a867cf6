"""lora: starts; settings; variants; on bfloat16 starts and ends as the base."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.tuners import base, logprobs, plain, put, train
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.registry import build, provides_of


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_lora_starts(start, kind, tmp_path):
    attached = put("lora", base(kind), init_lora_weights=start, lora_dropout=0.1)
    untuned = logprobs(Untuned(base(kind)))
    assert torch.allclose(logprobs(attached), untuned, atol=2e-6)
    # B A is the best rank-r part of the base weight, which itself is untouched
    if start == "pissa" and kind == "llama":
        layer = attached.layers["model.layers.0.self_attn.q_proj"]
        W = base().model.layers[0].self_attn.q_proj.weight
        U, S, Vh = torch.linalg.svd(W)
        assert torch.allclose(layer.get_delta_weight("default"), (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-5)
        assert torch.equal(layer.get_base_layer().weight, W)
    with torch.enable_grad():
        train(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), untuned)
    tuned = logprobs(attached)
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), plain(attached.model), atol=1e-5
    )
    again = build("tuner", attached.settings).attach(base(kind))
    again.load(again.read(tmp_path))
    assert torch.equal(logprobs(again), tuned)


def test_lora_settings():
    for settings, said in [
        ({"init_lora_weights": "loftq"}, "before the base was quantized"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 0.9}}, "eva_config has no setting 'tau'"),
        (
            {"corda_config": {"corda_method": "kpm"}},
            "corda_config is only used with init_lora_weights: corda",
        ),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "kmp"}}, "must be one of"),
        ({"init_lora_weights": "pisa"}, "is unknown"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "cannot be combined with"),
        ({"bias": "some"}, "bias"),
    ]:
        with pytest.raises(RecipeError, match=said):
            build("tuner", {"name": "lora", **settings})
    assert "low-rank" in provides_of(build("tuner", "lora")) and "low-rank" not in provides_of(
        build("tuner", {"name": "lora", "use_dora": True})
    )
    layer = put("lora", r=4, lora_alpha=8, use_rslora=True).layers["model.layers.0.mlp.up_proj"]
    assert layer.scaling["default"] == 4


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}]
)
@torch.no_grad()
def test_lora_variants(settings, tmp_path):
    attached = put("lora", **settings)
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base())))
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    assert torch.equal(logprobs(attached), tuned)
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path).eval()), plain(attached.model), atol=1e-5
    )


@pytest.mark.parametrize(
    "settings", [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"}]
)
@torch.no_grad()
def test_lora_on_bfloat16_starts_and_ends_as_the_base(settings):
    untuned = logprobs(Untuned(base().bfloat16()))
    attached = put("lora", base().bfloat16(), **settings)
    assert torch.allclose(logprobs(attached), untuned, atol=0.15)
    with torch.enable_grad():
        train(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), untuned)


@torch.no_grad()
def test_lora_with_biases_is_switched_off_exactly(tmp_path):
    attached = put("lora", base("gpt2"), bias="all")
    with torch.enable_grad():
        train(attached)
    assert any(k.endswith("bias") for k in attached.parameters())
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base("gpt2"))))
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base("gpt2"), tmp_path).eval()), plain(attached.model), atol=1e-5
    )


@torch.no_grad()
def test_an_adapter_of_another_scale_is_refused(tmp_path):
    put("lora", lora_alpha=8).save(tmp_path)
    with pytest.raises(RecipeError, match="lora_alpha=8, but this recipe has lora_alpha=16"):
        put("lora").read(tmp_path)
    with pytest.raises(RecipeError, match="does not fit"):
        put("lora", lora_alpha=8, target_modules=["q_proj"]).read(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_export_lora_of_any_weight_change(kind, tmp_path):
    target = ["mlp.up_proj", "embed_tokens"] if kind == "llama" else ["c_fc", "attn.c_proj"]
    attached = put("lora_sb", base(kind), target_modules=target)
    with torch.enable_grad():
        train(attached)
    assert attached.export_lora(tmp_path, rank=2) > 0.01  # less than its rank: told how much is lost
    assert attached.export_lora(tmp_path, rank=4) < 1e-4
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), plain(attached.model), atol=1e-4
    )
    with pytest.raises(RecipeError, match="more than the weight"):
        put("ssf").export_lora(tmp_path)


@torch.no_grad()
def test_export_lora_of_a_peft_type(tmp_path):
    attached = put("peft", type="loha", config={"r": 2, "target_modules": ["q_proj"], "init_weights": False})
    assert attached.export_lora(tmp_path) < 1e-5
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path).eval()), plain(attached.model), atol=1e-4
    )
