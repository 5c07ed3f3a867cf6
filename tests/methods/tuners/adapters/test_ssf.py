"""ssf: folds into weight and bias."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tuners import base, logprobs, plain, put
from luthier.errors import RecipeError


@torch.no_grad()
def test_ssf_folds_into_weight_and_bias():
    attached = put("ssf", base("gpt2"), target_modules=["c_fc", "ln_1"])
    # two per channel of every module
    assert sum(p.numel() for p in attached.parameters().values()) == 2 * 2 * (128 + 32)
    for p in attached.parameters().values():
        p.add_(torch.randn(p.shape) * 0.2)
    tuned, p = logprobs(attached), attached.tensors()
    with attached.merged() as model:
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
        start = base("gpt2").transformer.h[0]
        scale, shift = p["transformer.h.0.mlp.c_fc.scale"], p["transformer.h.0.mlp.c_fc.shift"]
        folded = model.transformer.h[0].mlp.c_fc.get_base_layer()
        assert torch.allclose(folded.weight, start.mlp.c_fc.weight * scale)
        assert torch.allclose(folded.bias, start.mlp.c_fc.bias * scale + shift)
    with pytest.raises(RecipeError, match="does not support modules of type LlamaRMSNorm"):
        put("ssf", target_modules=["input_layernorm"])


@torch.no_grad()
def test_on_a_network_without_biases_the_merged_model_has_them(tmp_path):
    attached = put("ssf")
    for p in attached.parameters().values():
        p.add_(torch.randn(p.shape) * 0.2)
    attached.export_merged(tmp_path)
    assert attached.model.config.attention_bias is False and attached.model.config.mlp_bias is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.attention_bias and again.config.mlp_bias
    assert torch.allclose(plain(again), plain(attached.model), atol=2e-5)


@torch.no_grad()
def test_biases_that_only_some_modules_gain_are_zero_in_the_others(tmp_path):
    attached = put("ssf", target_modules=["q_proj", "down_proj"])
    for p in attached.parameters().values():
        p.add_(torch.randn(p.shape) * 0.2)
    attached.export_merged(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(plain(again), plain(attached.model), atol=2e-5)
    assert not again.model.layers[0].self_attn.k_proj.bias.any()
