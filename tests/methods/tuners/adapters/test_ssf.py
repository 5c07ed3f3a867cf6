"""ssf: folds into weight and bias."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from helpers.tuners import SHAPE, base, logprobs, plain, put
from helpers.weight_tuners import One, descend, to_end
from luthier.errors import RecipeError
from luthier.registry import build


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


@torch.no_grad()
def test_ssf_scales_rms_norms_and_folds_into_them(tmp_path):
    attached = put("ssf", norms=True)
    linear = put("ssf")
    numbers = lambda t: sum(p.numel() for p in t.parameters().values())
    assert numbers(attached) == numbers(linear) + 5 * 32  # two norms a layer and the last: scales alone
    for p in attached.parameters().values():
        p.add_(torch.randn(p.shape) * 0.2)
    tuned = logprobs(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(put("ssf")))
    with attached.merged() as model:
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
        norm = model.model.layers[0].input_layernorm.get_base_layer()
        scale = attached.tensors()["model.layers.0.input_layernorm.scale"]
        assert torch.allclose(norm.weight, base().model.layers[0].input_layernorm.weight * scale)
    attached.save(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(plain(again), plain(attached.model), atol=2e-5)
    only = put("ssf", norms=True, layers_to_transform=[1])
    assert all(".layers.1." in name for name in only.layers) and len(only.layers) == 9
    gemma = GemmaForCausalLM(GemmaConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2, head_dim=8))
    for settings in ({"norms": True}, {"target_modules": ["q_proj", "input_layernorm"]}):
        with pytest.raises(RecipeError, match="not proportional"):
            put("ssf", gemma, **settings)


@torch.no_grad()
def test_ssf_without_its_shift_is_ia3():
    ssf = put("ssf", target_modules=["k_proj", "v_proj"])
    ia3 = put("ia3", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    for name, layer in ssf.layers.items():
        scale = 1 + 0.3 * torch.randn(layer.get_base_layer().out_features)
        layer.tensors("default").scale.data.copy_(scale)
        (other,) = (p for k, p in ia3.parameters().items() if k.startswith(f"{name}."))
        other.copy_(scale.view(other.shape))
    assert torch.allclose(plain(ssf.model), plain(ia3.model), atol=1e-5)


def test_a_norm_is_refused_by_a_tuner_of_matrices():
    with pytest.raises(RecipeError, match="does not support modules of type LlamaRMSNorm"):
        put("lora_sb", target_modules=["input_layernorm"])


@pytest.mark.long
def test_ssf_solves_what_a_head_alone_does_not():
    """Shifted features: every unit of a frozen layer is near its limit, whatever it reads."""

    class Net(One):
        def __init__(self):
            super().__init__(torch.randn(64, 2))
            self.fc = torch.nn.Linear(2, 64)
            self.fc.weight.data.normal_()
            self.fc.bias.data.fill_(5.0)
            self.head = torch.nn.Linear(64, 2)

        def forward(self, x):
            return self.head(self.fc(x).tanh())

    torch.manual_seed(0)
    x = torch.randn(200, 2)
    labels = (x[:, 0] * x[:, 1] > 0).long()  # no line through the inputs tells

    def accuracy(reached: str) -> float:
        """After training what has this in its name; the head in any case."""
        torch.manual_seed(1)
        spec = {"name": "ssf", "target_modules": ["fc"], "modules_to_save": ["head"]}
        attached = build("tuner", spec).attach(Net())
        for name, p in attached.parameters().items():
            p.requires_grad_(reached in name)
        loss = lambda: torch.nn.functional.cross_entropy(attached.model(x), labels)
        to_end(descend(attached, loss, 300, 0.1))
        return float((attached.model(x).argmax(1) == labels).float().mean())

    assert accuracy("") > 0.95
    assert accuracy("head") < 0.8


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
