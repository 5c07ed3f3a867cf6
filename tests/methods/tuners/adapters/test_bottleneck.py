"""bottleneck: as many numbers move as the formula says; adapters stand where the papers put them."""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import base, put
from luthier.errors import RecipeError


@pytest.mark.parametrize(
    "name, formula",
    [
        ("lora", lambda out, in_: 4 * (out + in_)),
        ("lora_sb", lambda out, in_: 16),
        ("loldu", lambda out, in_: 5),
        ("spiel", lambda out, in_: max(1, round(0.01 * out * in_))),
        ("ssf", lambda out, in_: 2 * out),
        ("dsee", lambda out, in_: 4 * (out + in_) + 64),
        ("parallel_adapter", lambda out, in_: max(1, round(in_ / 16)) * (in_ + 1 + out) + out),
    ],
)
def test_as_many_numbers_move_as_the_formula_says(name, formula):
    attached = put(name)
    shapes = [layer.get_base_layer().weight.shape for layer in attached.layers.values()]
    assert sum(p.numel() for p in attached.parameters().values()) == sum(formula(*s) for s in shapes)


@torch.no_grad()
def test_adapters_stand_where_the_papers_put_them():
    for kind, attention, ffn in (("llama", "o_proj", "down_proj"), ("gpt2", "attn.c_proj", "mlp.c_proj")):
        both, one = put("houlsby", base(kind)).layers, put("pfeiffer", base(kind)).layers
        assert len(both) == 4 and all(n.endswith((attention, ffn)) for n in both)
        assert len(one) == 2 and all(n.endswith(ffn) for n in one)
    attached, x = put("houlsby", reduction_factor=8), torch.randn(3, 32)
    layer = attached.layers["model.layers.0.self_attn.o_proj"]
    p = layer.tensors("default")
    p.up.normal_(), p.up_bias.normal_()
    y = layer.base_layer(x)
    assert torch.allclose(layer(x), y + (y @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias, atol=1e-5)
    with pytest.raises(RecipeError, match="has no LoRA form"):
        attached.export_lora("/nowhere")
