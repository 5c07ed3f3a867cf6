"""r_amt: masks; is kept as bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.subset_tuners import base, loss_of, put, say, train


@pytest.mark.long
def test_r_amt_masks():
    attached, before = put("r_amt"), base()
    W = torch.randn(3, 5)
    p = SimpleNamespace(
        M=torch.full((3, 5), 1e-2, requires_grad=True), bits=torch.full((2,), 255, dtype=torch.uint8)
    )
    attached.settings.weight(W, p).backward(G := torch.randn(3, 5))
    assert torch.equal(p.M.grad, G * W)  # straight through
    start = float(loss_of(attached.model))
    train(attached, 30, rate=1e-3)
    masks = [m <= attached.settings.threshold for m in attached.parameters().values()]
    masked = float(sum(m.sum() for m in masks)) / sum(m.numel() for m in masks)
    assert 0 < masked < 0.5 and float(loss_of(attached.model)) < start
    untouched = dict(before.named_parameters())
    with attached.merged():
        for name, layer in attached.layers.items():
            now, was = layer.get_base_layer().weight, untouched[f"{name}.weight"]
            assert ((now == was) | (now == 0)).all()


def test_r_amt_is_kept_as_bits(tmp_path):
    attached = put("r_amt")
    train(attached, 10, rate=1e-3)
    attached.save(tmp_path)
    numbers = sum(p.numel() for p in attached.parameters().values())
    held = attached.adapter_state()
    assert sum(v.numel() for v in held.values()) == numbers // 8 and {v.dtype for v in held.values()} == {
        torch.uint8
    }
    again = put("r_amt")
    again.load(again.read(tmp_path))
    assert torch.equal(say(again.model), say(attached.model))
