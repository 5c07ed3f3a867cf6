"""APT: its formula, the base as its case, and what it costs."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.tuners import IDS, base, batch, logprobs, put
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal

ATTENTION = "model.layers.0.self_attn.o_proj"


def filled(**settings: Any) -> Any:
    attached = put("apt", None, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.3, generator=generator)
    return attached


@torch.no_grad()
def test_it_is_the_formula():
    attached = filled(num_virtual_tokens=5, r=2)
    attention, x = attached.model.model.layers[0].self_attn, torch.randn(4, 32)
    layer = attached.layers[ATTENTION]
    p = layer.tensors("default")
    attention.q_proj(x)  # from which the layer hears what the attention reads
    h = torch.randn(4, 32)
    out = layer(h)
    for i in range(4):
        scores = []
        for token in p.P:
            key = token + p.V.T @ (p.U.T @ token)
            scores.append(max(0.0, float(x[i] @ key)))
        want = layer.base_layer(h[i])
        for score, token in zip(scores, p.P, strict=True):
            want = want + max(scores) * score * token
        assert torch.allclose(out[i], want * exp(float(p.gain)), atol=1e-4, rtol=1e-5)
    # the split that it replaces: joint attention is a convex combination of both
    q, k, v, pk, pv = (torch.randn(n, 8) for n in (5, 7, 7, 3, 3))
    joint = (q @ torch.cat([pk, k]).T).softmax(-1)
    a = joint[:, :3].sum(-1, keepdim=True)
    parts = (1 - a) * ((q @ k.T).softmax(-1) @ v) + a * ((q @ pk.T).softmax(-1) @ pv)
    assert torch.allclose(joint @ torch.cat([pv, v]), parts, atol=1e-6)
    with pytest.raises(RecipeError, match="last matrices of sublayers"):
        put("apt", None, target_modules=["q_proj"])


def test_without_prompts_it_is_the_base():
    attached = put("apt", None)
    with torch.no_grad():
        for name, p in attached.parameters().items():
            if name.endswith(".P"):
                p.zero_()
        assert torch.equal(attached.model(IDS).logits, base()(IDS).logits)
    moved = filled()
    logprobs(moved).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in moved.parameters().values())


@torch.no_grad()
def test_cost_grows_linearly_and_sequences_stay():
    counts = {}
    for n in (0, 4, 8, 16):
        model = base() if n == 0 else put("apt", None, num_virtual_tokens=n).model
        with FlopCounterMode(display=False) as counter:
            assert model(IDS).logits.shape == (*IDS.shape, 97)
        counts[n] = counter.get_total_flops()
    assert counts[16] - counts[8] == 2 * (counts[8] - counts[4]) > 0
    few, none = put("apt", None, num_virtual_tokens=4), put("lora")
    assert [Causal().layout(t.model, t, batch(), False).source.numel() for t in (few, none)] == [
        Causal().layout(none.model, none, batch(), False).source.numel()
    ] * 2
