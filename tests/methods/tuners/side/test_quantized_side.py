"""Quantized side tuning: the formula, what is in the graph, and where it starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers.tuners import IDS, base, logprobs, put
from luthier.methods.tuners._base import Untuned


def filled(model=None, **settings):
    attached = put("quantized_side", model, reduction_factor=4, rank=3, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.5, generator=generator)
    return attached


@torch.no_grad()
@pytest.mark.parametrize("downsample", ["low_rank", "average_pool"])
def test_the_side_network_is_the_formula(downsample):
    attached = filled(downsample=downsample)
    with attached.off():
        states = attached.model(IDS, output_hidden_states=True).hidden_states
        last = []
        hook = attached.model.model.norm.register_forward_pre_hook(lambda m, x: last.append(x[0]))
        attached.model(IDS)
        hook.remove()
    h = [*states[:-1], last[0]]
    p = [attached.layers[f"model.layers.{i}.mlp.down_proj"].tensors("default") for i in range(2)]

    def down(x, p, name=""):
        if downsample == "average_pool":
            low = x.unflatten(-1, (8, 4)).mean(-1)
        else:
            low = x @ getattr(p, f"{name}A").T @ getattr(p, f"{name}B").T
        return F.layer_norm(low, (8,), getattr(p, f"{name}norm"), getattr(p, f"{name}norm_bias"))

    g = down(h[0], p[0], "start_")
    for i in range(2):
        z = torch.sigmoid(p[i].zeta)
        g = (1 - z) * down(h[i + 1], p[i]) + z * g
        x = g / (g.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[i].block_norm
        g = g + (F.silu(x @ p[i].gate.T) * (x @ p[i].up.T)) @ p[i].out.T
    model = attached.model
    logits = model.lm_head(model.model.norm(p[1].mix * h[2] + (1 - p[1].mix) * (g @ p[1].U.T)))
    assert torch.allclose(model(IDS).logits, logits, atol=1e-4)


def test_nothing_of_the_base_is_in_the_graph():
    """However deep the base is, backward holds tensors of the side network alone."""
    attached = filled()
    layers, depends = attached.model.model.layers, []
    for layer in layers[:-1]:
        layer.register_forward_hook(lambda m, x, y: depends.append(y.requires_grad))
    widths = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (widths.append(t.shape[-1]), t)[1], lambda t: t):
        loss = logprobs(attached).sum()
    assert widths and 64 not in widths  # what feed-forward blocks of the base compute is stored nowhere
    assert depends == [False] * len(depends) and depends
    loss.backward()
    own = {id(p) for p in attached.parameters().values()}
    for p in attached.model.parameters():
        assert (p.grad is None) == (id(p) not in own)


@torch.no_grad()
def test_over_a_quantized_base_it_starts_as_that():
    attached = put("quantized_side", base("codes"))
    assert torch.equal(logprobs(attached), logprobs(Untuned(base("codes"))))
    for name, p in attached.parameters().items():
        if not name.endswith("mix"):
            p.add_(1.0)
    assert torch.equal(logprobs(attached), logprobs(Untuned(base("codes"))))  # s is 1
    attached.parameters()["model.layers.1.mlp.down_proj.mix"].fill_(0.5)
    assert not torch.allclose(logprobs(attached), logprobs(Untuned(base("codes"))), atol=1e-2)


def test_numbers_are_the_formula():
    d, ff, r, rank, layers = 32, 64, 4, 3, 2
    k, inner = d // r, ff // r
    down = rank * d + k * rank + 2 * k
    block = k + 3 * k * inner
    want = layers * (down + k + block) + down + d * k + 1
    assert sum(p.numel() for p in filled().parameters().values()) == want
