"""MoSA: disjoint parts whose sum is one adapter, and gradients of one part."""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import logprobs, put
from luthier.methods.tuners.adapters._sublayer import Passed
from luthier.registry import build

DOWN = "model.layers.0.mlp.down_proj"


def filled(**settings):
    attached = put("mosa", bottleneck=8, **settings)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return attached


@torch.no_grad()
def test_parts_are_disjoint_and_their_sum_is_the_adapter():
    attached = filled(parts=4)
    layer = attached.layers[DOWN]
    p = layer.tensors("default")
    masks = [p.up_part == e for e in range(4)]
    assert all(int(m.sum()) == p.up.numel() // 4 for m in masks)
    together = torch.stack(masks)
    assert torch.equal(together.sum(0), torch.ones_like(p.up).long())
    assert torch.equal((p.up * together).sum(0), p.up)
    plain = put("sublayer_adapter", bottleneck=8, scaling=1.0)
    for key, value in attached.parameters().items():
        plain.parameters()[key].copy_(value)
    assert torch.equal(logprobs(attached), logprobs(plain))
    settings = build("tuner", {"name": "mosa", "bottleneck": 8})
    assert settings.numbers(32) == 2 * 32 * 8 + 8 + 32


@pytest.mark.parametrize("split", ["up", "both"])
def test_gradients_stay_in_the_part_that_was_drawn(split):
    attached = filled(parts=4, split=split)
    layer = attached.layers[DOWN]
    p = layer.tensors("default")
    layer.train()
    used = set()
    for seed in range(12):
        torch.manual_seed(seed)
        draws = torch.randint(4, (2,)).tolist()
        torch.manual_seed(seed)
        for q in attached.parameters().values():
            q.grad = None
        h, x = torch.randn(5, 32), torch.randn(5, 64)
        torch.manual_seed(seed)
        layer.base_layer.sublayer_input = Passed(h)
        layer(x).square().sum().backward()
        assert not p.up.grad[p.up_part != draws[1]].any() and p.up.grad.any()
        assert not p.down.grad[p.down_part != draws[0]].any() and p.down.grad.any()
        used.add(tuple(draws))
    assert len(used) > 4
    # of a split `down` the pass reads one part; of the other all of it
    with torch.no_grad():
        torch.manual_seed(0)
        draws = torch.randint(4, (2,)).tolist()
        torch.manual_seed(0)
        layer.base_layer.sublayer_input = Passed(h)
        down = p.down * (p.down_part == draws[0]) if split == "both" else p.down
        up = p.up * (p.up_part == draws[1])
        change = torch.relu(h @ down.T + p.down_bias) @ up.T + p.up_bias
        assert torch.allclose(layer(x), layer.base_layer(x) + change, atol=1e-5)


@pytest.mark.long
def test_one_part_trains_as_the_plain_adapter(base, tmp_path):
    """Bit for bit, with the same seed."""
    import luthier

    losses = {}
    for name, settings in (("mosa", {"parts": 1}), ("sublayer_adapter", {"scaling": 1.0})):
        spec = {"name": name, "bottleneck": 8, **settings}
        recipe = {**base, "tuner": spec, "max_steps": 6, "learning_rate": 1e-2}
        losses[name] = luthier.tune(**recipe, output_dir=str(tmp_path / name)).losses
    assert losses["mosa"] == losses["sublayer_adapter"]
