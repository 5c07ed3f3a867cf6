"""s2ft: is the leading block of a permuted model; with all of down is full tuning of down; leaves the rest
and composes; keeps the chosen activations only.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.subset_tuners import base, loss_of, put, say, train
from luthier.registry import build


def permuted(model, first: dict[int, torch.Tensor], heads: dict[int, torch.Tensor]) -> nn.Module:
    """The same function with the chosen channels and key-value groups of each layer in front: S2FT's
    co-permutation.
    """
    model = copy.deepcopy(model)
    config = model.config
    size, group = (
        config.hidden_size // config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    for i, layer in enumerate(model.model.layers):
        order = torch.cat(
            [
                first[i],
                torch.tensor([c for c in range(config.intermediate_size) if c not in set(first[i].tolist())]),
            ]
        )
        kv = torch.cat(
            [
                heads[i],
                torch.tensor(
                    [h for h in range(config.num_key_value_heads) if h not in set(heads[i].tolist())]
                ),
            ]
        )
        rows = lambda hs: (hs[:, None] * size + torch.arange(size)).flatten()
        q = rows((kv[:, None] * group + torch.arange(group)).flatten())
        with torch.no_grad():
            mlp, attn = layer.mlp, layer.self_attn
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
            attn.q_proj.weight.copy_(attn.q_proj.weight[q])
            attn.k_proj.weight.copy_(attn.k_proj.weight[rows(kv)])
            attn.v_proj.weight.copy_(attn.v_proj.weight[rows(kv)])
            attn.o_proj.weight.copy_(attn.o_proj.weight[:, q])
    return model


def test_s2ft_is_the_leading_block_of_a_permuted_model():
    """Grouped queries included: permuting changes nothing, and what is tuned there is what is tuned here."""
    model = base()
    attached = put("s2ft", copy.deepcopy(model), d_ratio=0.25, o_ratio=0.5, v_ratio=0.5, u_ratio=0.25)
    at = lambda i, n: (
        attached.parameters and attached.layers[f"model.layers.{i}.{n}"].tensors("default").indices.long()
    )
    channels = {i: at(i, "mlp.down_proj") for i in range(4)}
    heads = {i: at(i, "self_attn.v_proj")[::8] // 8 for i in range(4)}
    assert all(torch.equal(at(i, "mlp.up_proj"), channels[i]) for i in range(4))  # coupled
    other = permuted(model, channels, heads)
    assert torch.allclose(say(other), say(model), atol=1e-5)
    for p in other.parameters():
        p.requires_grad_(False)
    slices = []
    for layer in other.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        for W, side in (
            (mlp.down_proj, "in"),
            (mlp.up_proj, "out"),
            (attn.o_proj, "in"),
            (attn.v_proj, "out"),
        ):
            k = {mlp.down_proj: 16, mlp.up_proj: 16, attn.o_proj: 16, attn.v_proj: 8}[W]
            slices.append(
                (W.weight.requires_grad_(True), (slice(None), slice(k)) if side == "in" else slice(k))
            )
    for _ in range(3):
        loss_of(other).backward()
        with torch.no_grad():
            for W, where in slices:
                W[where] -= 0.1 * W.grad[where]
                W.grad = None
    train(attached, 3, rate=0.1, transform=None)
    assert torch.allclose(say(attached.model), say(other), atol=1e-4)


def test_s2ft_with_all_of_down_is_full_tuning_of_down():
    attached, model = put("s2ft", d_ratio=1.0, o_ratio=0.0), base()
    train(attached, 3)
    full = build(
        "tuner", {"name": "cofitune", "layer_range": [0, 1], "modules": ["down"], "soft_mask": False}
    ).attach(model)
    train(full, 3)
    assert torch.allclose(say(attached.model), say(model), atol=1e-4)


@torch.no_grad()
def test_s2ft_leaves_the_rest_and_composes():
    one = put("s2ft", d_ratio=0.1, o_ratio=0.0)
    with torch.enable_grad():
        train(one)
    name, layer = next(iter(one.layers.items()))
    p, W = layer.tensors("default"), base().get_submodule(name).weight
    out = torch.ones(W.shape[1], dtype=torch.bool)
    out[p.indices.long()] = False
    with one.merged():
        now = one.model.get_submodule(name).get_base_layer().weight
        assert torch.equal(now[:, out], W[:, out]) and not torch.equal(now[:, ~out], W[:, ~out])
    for seed in range(1, 50):  # another task's channels, none of them shared
        two = put("s2ft", d_ratio=0.1, o_ratio=0.0, selection_seed=seed)
        q = two.layers[name].tensors("default")
        if not set(q.indices.tolist()) & set(p.indices.tolist()):
            break
    q.S.normal_()
    both = two.settings.at(name).weight(one.settings.at(name).weight(W, p), q)
    delta = lambda r: two.settings.at(name).weight(torch.zeros_like(W), r)
    assert torch.allclose(both - W, delta(p) + delta(q), atol=1e-6)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_s2ft_keeps_the_chosen_activations_only(share):
    """What down keeps for its backward pass beside the weight and the places is [tokens, k]."""
    attached = put("s2ft", d_ratio=share, o_ratio=0.0)
    layer, kept = attached.layers["model.layers.0.mlp.down_proj"], []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda z: (kept.append(z), z)[1], lambda z: z):
        layer(x)
    mine = [z for z in kept if z.is_floating_point() and z.ndim == 2 and 5 in z.shape]
    assert sum(z.numel() for z in mine) == 5 * round(64 * share)


def test_s2ft_counts():
    """d_ratio * intermediate columns of down, o_ratio * heads of o: the paper's numbers."""
    attached = put("s2ft", d_ratio=0.25, o_ratio=0.5)
    moving = sum(p.numel() for p in attached.parameters().values())
    assert moving == 4 * (32 * 16 + 32 * 2 * 8)
    assert moving == sum(p.numel() for p in attached.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("selection", ["weight", "activation", "gradient"])
@pytest.mark.parametrize("extreme", ["largest", "smallest"])
def test_s2ft_selects_by_weights_activations_and_gradients(selection, extreme):
    """The channels with the largest norms over up, gate and down together, and the heads over v and o."""
    from helpers.subset_tuners import ROWS, batch, roles_of

    attached = put("s2ft", d_ratio=0.1, o_ratio=0.5, v_ratio=0.5, selection=selection, extreme=extreme)
    attached.initialize(ROWS, roles_of(attached))
    model = base()
    mlp, attn = model.model.layers[1].mlp, model.model.layers[1].self_attn
    read = {}
    for name, module in (("down", mlp.down_proj), ("o", attn.o_proj)):
        module.register_forward_hook(lambda m, x, y, name=name: read.__setitem__(name, x[0].detach()))
    roles = roles_of(build("tuner", "full").attach(model))
    roles.policy.outputs(batch()).logprobs.mean().neg().backward()
    if selection == "activation":
        channels, heads = (read[part].flatten(0, -2).square().sum(0) for part in ("down", "o"))
    else:
        X = lambda m: (m.weight.grad if selection == "gradient" else m.weight).detach().square()
        channels = X(mlp.up_proj).sum(1) + X(mlp.gate_proj).sum(1) + X(mlp.down_proj).sum(0)
        heads = X(attn.o_proj).sum(0).view(2, -1).sum(1) + X(attn.v_proj).sum(1).view(2, -1).sum(1)
    k, largest = round(0.1 * len(channels)), extreme == "largest"
    at = lambda n: attached.layers[f"model.layers.1.{n}"].tensors("default").indices
    assert at("mlp.down_proj").tolist() == channels.topk(k, largest=largest).indices.sort().values.tolist()
    first = int(heads.view(2, -1).sum(1).topk(1, largest=largest).indices)  # a group of two heads of eight
    assert at("self_attn.o_proj").tolist() == list(range(16 * first, 16 * first + 16))
    assert at("self_attn.v_proj").tolist() == list(range(8 * first, 8 * first + 8))
