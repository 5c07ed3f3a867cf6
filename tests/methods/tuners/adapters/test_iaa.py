"""Inside and aside adapters: the reduction, the formula of the chain, and its gradient."""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import IDS, logprobs, put

DOWN = "model.layers.{}.mlp.down_proj"


def fill(attached, part=""):
    """Normal numbers in the tensors whose slot begins with this."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in attached.parameters().items():
            value = torch.randn(p.shape, generator=generator) * 0.3
            if name.rpartition(".")[2].startswith(part):
                p.copy_(value)
    return attached


@torch.no_grad()
def test_without_aside_it_is_the_adapter_inside():
    ours, theirs = fill(put("iaa")), put("pfeiffer")
    for name, p in ours.parameters().items():
        if name.rpartition(".")[2].startswith("aside_up"):
            p.zero_()
        elif name in theirs.parameters():
            theirs.parameters()[name].copy_(p)
    assert torch.allclose(logprobs(ours), logprobs(theirs), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["add", "gate"])
def test_the_chain_is_the_formula(fusion):
    attached = fill(put("iaa", fusion=fusion, non_linearity="tanh"), "aside")
    with attached.off():
        h = attached.model.model.embed_tokens(IDS)
    places = torch.arange(IDS.shape[1])[None]
    model, aside = attached.model.model, 0.0
    for i, layer in enumerate(model.layers):
        with attached.off():
            h = layer(h, position_embeddings=model.rotary_emb(h, places))
        p = attached.layers[DOWN.format(i)].tensors("default")
        low = torch.tanh((h + aside) @ p.aside_down.T + p.aside_down_bias)
        aside = aside + low @ p.aside_up.T + p.aside_up_bias
        h = h + aside * (p.aside_gate if fusion == "gate" else 1.0)
    assert torch.allclose(attached.model(IDS).logits, attached.model.lm_head(model.norm(h)), atol=1e-4)


def test_the_lowest_layer_gets_more_gradient():
    """At the start, where both are the base: all of the adapter's gradient, and that of the chain."""
    norms = {}
    for name in ("pfeiffer", "iaa"):
        attached = put(name, reduction_factor=16)
        logprobs(attached).mean().neg().backward()
        grads = attached.parameters()
        own = [p.grad for key, p in grads.items() if key.startswith("model.layers.0.") and p.grad is not None]
        norms[name] = torch.cat([g.flatten() for g in own]).norm()
    assert norms["iaa"] > 1.2 * norms["pfeiffer"]
