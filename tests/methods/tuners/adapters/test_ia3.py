"""ia3: is scales that fold into weights."""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import base, logprobs, plain, put
from helpers.weight_tuners import KINDS


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ia3_is_scales_that_fold_into_weights(kind, tmp_path):
    from peft import IA3Config, get_peft_model

    attached = put("ia3", base(kind))
    # of k and v (half as wide as q), or of the fused three; of what is inside
    widths = {"llama": 2 * 16 + 64, "gpt2": 3 * 32 + 128}
    assert sum(p.numel() for p in attached.parameters().values()) == 2 * widths[kind]
    torch.manual_seed(3)
    for p in attached.parameters().values():
        p.add_(0.3 * torch.randn(p.shape))
    tuned, start = logprobs(attached), base(kind)
    k, down = (
        ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
        if kind == "llama"
        else ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")
    )
    with attached.merged() as model:
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
        for name, dim in ((k, 0), (down, 1)):
            W, was = (m.get_submodule(name) for m in (model, start))
            scale = attached.layers[name].ia3_l["default"].flatten()
            sides = (
                (scale[:, None] if dim == 0 else scale[None])
                if kind == "llama"
                else (scale[None] if dim == 0 else scale[:, None])
            )
            assert torch.equal(W.get_base_layer().weight, was.weight * sides)
            if was.bias is not None:
                assert torch.equal(W.get_base_layer().bias, was.bias * scale if dim == 0 else was.bias)
    inner = ["k_proj", "v_proj", "down_proj"] if kind == "llama" else ["c_attn", "mlp.c_proj"]
    asked = IA3Config(target_modules=inner, feedforward_modules=inner[-1:], fan_in_fan_out=kind == "gpt2")
    theirs = get_peft_model(base(kind), asked)
    for name, layer in attached.layers.items():
        theirs.base_model.model.get_submodule(name).ia3_l["default"].copy_(layer.ia3_l["default"])
    assert torch.allclose(plain(theirs.eval()), plain(attached.model), atol=1e-6)
    named = put("ia3", base(kind), target_modules=inner, feedforward_modules=inner[-1:])
    assert named.layers.keys() == attached.layers.keys()
    assert [m.is_feedforward for m in named.layers.values()] == [
        m.is_feedforward for m in attached.layers.values()
    ]
    attached.save(tmp_path)
    assert '"peft_type": "IA3"' in (tmp_path / "adapter_config.json").read_text()
