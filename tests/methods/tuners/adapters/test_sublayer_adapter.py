"""Adapters by their parts: the identities of the unified view, and what each setting reads and changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.tuners import IDS, base, logprobs, put, train
from luthier.methods.tuners.adapters._bottleneck import through
from luthier.registry import build

DOWN, ATTENTION = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"


def filled(name="sublayer_adapter", **settings):
    """After no tensor is zero any more."""
    attached = put(name, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.3, generator=generator)
    return attached


def test_a_prefix_is_a_gated_parallel_adapter():
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8)
    pk, pv = torch.randn(3, 8), torch.randn(3, 8)
    joint = (q @ torch.cat([pk, k]).T).softmax(-1) @ torch.cat([pv, v])
    prefix, text = (q @ pk.T).exp().sum(-1), (q @ k.T).exp().sum(-1)
    share = (prefix / (prefix + text))[:, None]
    own = (q @ k.T).softmax(-1) @ v
    assert torch.allclose(joint, (1 - share) * own + share * ((q @ pk.T).softmax(-1) @ pv), atol=1e-5)


@torch.no_grad()
def test_the_tuners_prefix_is_that_adapter():
    """What tuner `prefix` makes of one attention is the convex combination of both."""
    attached = put("prefix", target_modules=["layers.0.self_attn.k_proj"])
    model = attached.model
    outputs = []
    own = model.model.layers[0].self_attn
    own.o_proj.register_forward_pre_hook(lambda m, x: outputs.append(x[0]))
    heard = []
    own.q_proj.register_forward_hook(lambda m, x, y: heard.append(y))
    logprobs(attached)
    with_prefix = outputs[-1]
    with attached.off():
        logprobs(attached)
    without = outputs[-1]
    assert with_prefix.shape == without.shape and not torch.allclose(with_prefix, without)
    assert torch.equal(heard[0], heard[-1])  # queries of the first layer are the text's alone
    keys, values = attached.layers["model.layers.0.self_attn.k_proj"].prefix_kv()
    heads, size = 4, 8
    # the first token attends to itself alone, and is not rotated
    queries = heard[-1][0, 0].view(heads, size)
    key = own.k_proj.base_layer(first_input(model))[0, 0].view(2, size)
    value = own.v_proj(first_input(model))[0, 0].view(2, size)
    for h in range(heads):
        g = h // 2
        pk, pv = keys.view(-1, 2, size)[:, g], values.view(-1, 2, size)[:, g]
        mass = torch.cat([(pk @ queries[h]) / size**0.5, (key[g] @ queries[h])[None] / size**0.5]).softmax(0)
        share = mass[:-1].sum()
        want = (1 - share) * value[g] + share * ((mass[:-1] / share) @ pv)
        assert torch.allclose(with_prefix[0, 0].view(heads, size)[h], want, atol=1e-5)


def first_input(model):
    """[1, 1, width] what the first layer's attention reads of the first token of the batch."""
    token = IDS[:1, :1]
    return model.model.layers[0].input_layernorm(model.model.embed_tokens(token))


@torch.no_grad()
def test_linear_beside_a_matrix_is_lora():
    lora = put("lora", r=4, lora_alpha=6, target_modules=["q_proj"])
    ours = put(
        "sublayer_adapter",
        insertion="beside",
        non_linearity="linear",
        bottleneck=4,
        scaling=6 / 4,
        target_modules=["q_proj"],
    )
    for name, p in lora.parameters().items():
        p.normal_(std=0.2)
        part = {"A": "down", "B": "up"}[name.rpartition(".")[2]]
        ours.parameters()[f"{name.rpartition('.')[0]}.{part}"].copy_(p)
    assert torch.allclose(logprobs(ours), logprobs(lora), atol=1e-5)
    layer, x = "model.layers.0.self_attn.q_proj", torch.randn(3, 32)
    assert torch.allclose(ours.layers[layer](x), lora.layers[layer](x), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("composition", ["add", "scaled", "gated"])
@pytest.mark.parametrize("sublayer, name", [("feed_forward", DOWN), ("attention", ATTENTION)])
def test_it_reads_and_changes_what_it_says(sublayer, name, composition):
    attached = filled(sublayers=sublayer, composition=composition, bottleneck=6)
    layer = attached.layers[name]
    block = attached.model.model.layers[0]
    heard = {}
    module = block.mlp if sublayer == "feed_forward" else block.self_attn
    first = block.mlp.up_proj if sublayer == "feed_forward" else module.q_proj
    first.register_forward_pre_hook(lambda m, x: heard.update(read=x[0]))
    layer.base_layer.register_forward_hook(lambda m, x, y: heard.update(before=y))
    layer.register_forward_hook(lambda m, x, y: heard.update(after=y))
    attached.model(IDS)
    p = layer.tensors("default")
    change = through(heard["read"], p.down, p.down_bias, p.up, p.up_bias, "relu")
    want = {
        "add": lambda y: y + change,
        "scaled": lambda y: y + 4.0 * change,
        "gated": lambda y: (1 - p.gate) * y + p.gate * change,
    }[composition](heard["before"])
    assert torch.allclose(heard["after"], want, atol=1e-5)
    assert set(attached.layers) == {name, name.replace("layers.0", "layers.1")}


@torch.no_grad()
@pytest.mark.parametrize("name, sublayers", [("houlsby", "both"), ("pfeiffer", "feed_forward")])
def test_houlsby_and_pfeiffer_are_settings(name, sublayers):
    theirs = filled(name, reduction_factor=4, non_linearity="relu")
    ours = put(
        "sublayer_adapter",
        insertion="sequential",
        composition="add",
        sublayers=sublayers,
    )
    for key, p in theirs.parameters().items():
        ours.parameters()[key].copy_(p)
    assert torch.equal(logprobs(ours), logprobs(theirs))


def test_numbers_are_the_formula():
    settings = build("tuner", {"name": "sublayer_adapter", "bottleneck": 512})
    assert settings.numbers(1024) == 2 * 1024 * 512 + 512 + 1024
    attached = put("sublayer_adapter", bottleneck=5, learn_scaling=True)
    assert sum(p.numel() for p in attached.parameters().values()) == 2 * (2 * 32 * 5 + 5 + 32 + 1)
    mam = put("mam", num_virtual_tokens=30, bottleneck=8)
    prefix, adapter = 30 * 2 * 16, 2 * 32 * 8 + 8 + 32
    assert sum(p.numel() for p in mam.parameters().values()) == 2 * (prefix + adapter)


@torch.no_grad()
def test_mix_and_match_is_its_two_parts():
    """A prefix by its own tuner, and an adapter written by hand beside each feed-forward block."""
    mam = filled("mam", num_virtual_tokens=3, bottleneck=4)
    prefix = put("prefix", num_virtual_tokens=3)
    for key, p in prefix.parameters().items():
        p.copy_(mam.parameters()[key])
    for i, block in enumerate(prefix.model.model.layers):
        p = mam.layers[f"model.layers.{i}.mlp.down_proj"].tensors("default")
        block.mlp = Beside(block.mlp, p)
    assert torch.allclose(logprobs(prefix), logprobs(mam), atol=1e-5)


class Beside(nn.Module):
    """A feed-forward block with a scaled adapter beside it."""

    def __init__(self, block, p):
        super().__init__()
        self.block, self.p = block, p

    def forward(self, x):
        p = self.p
        return self.block(x) + 4 * (torch.relu(x @ p.down.T + p.down_bias) @ p.up.T + p.up_bias)


def test_gated_leaves_the_base_and_learns():
    attached = put("sublayer_adapter", composition="gated")
    before = logprobs(attached).detach()
    train(attached, steps=4)
    assert not torch.allclose(logprobs(attached), before, atol=1e-3)
    assert torch.equal(before, logprobs(put("sublayer_adapter", composition="gated")).detach())
    assert torch.is_tensor(base()(IDS).logits)
