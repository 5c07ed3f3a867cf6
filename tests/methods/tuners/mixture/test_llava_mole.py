"""LLaVA-MoLE: LoRA as its case, tokens and their experts, the loss of balance, domains in conflict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.tuners import logprobs, put
from luthier.errors import RecipeError
from luthier.methods.tuners.mixture._llava_mole_model import Routing, balance_slope

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def filled(**settings):
    attached = put("llava_mole", **{"r": 4, "alpha": 4.0, **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.normal_(std=0.3, generator=generator)
    return attached


@pytest.mark.parametrize("scaled", [False, True])
def test_one_expert_is_lora(scaled):
    ours = filled(experts=1, scaled=scaled)
    lora = put("lora", r=4, lora_alpha=4, target_modules="all-linear")
    with torch.no_grad():
        for name, p in lora.parameters().items():
            p.copy_(ours.parameters()[name][0])
    mine, theirs = logprobs(ours), logprobs(lora)
    assert torch.allclose(mine, theirs, atol=1e-5)
    mine.sum().backward()
    theirs.sum().backward()
    for name, p in lora.parameters().items():
        assert torch.allclose(ours.parameters()[name].grad[0], p.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_each_token_is_read_by_its_expert_at_all_matrices(scaled):
    attached = filled(experts=3, scaled=scaled)
    mlp, x = attached.model.model.layers[0].mlp, torch.randn(2, 9, 32)
    p = {name: attached.layers[name].tensors("default") for name in (GATE, UP, DOWN)}
    out, used = mlp(x), set()
    for row in range(2):
        for t in range(9):
            odds = F.softmax(p[GATE].router @ x[row, t], 0)
            k = int(odds.argmax())
            used.add(k)
            by = float(odds[k]) if scaled else 1.0

            def through(name: str, h: torch.Tensor, k=k, by=by) -> torch.Tensor:
                weight = attached.layers[name].base_layer.weight
                return weight @ h + by * (p[name].B[k] @ (p[name].A[k] @ h))

            h = F.silu(through(GATE, x[row, t])) * through(UP, x[row, t])
            assert torch.allclose(out[row, t], through(DOWN, h), atol=1e-4)
    assert len(used) > 1
    with pytest.raises(RecipeError, match="before the one that routes"):
        attached.layers[DOWN](torch.randn(2, 64))
    with pytest.raises(RecipeError, match="routes at matrices 'gate'"):
        put("llava_mole", target_modules=["up_proj", "down_proj"])


def test_the_gradient_of_balance_is_that_of_its_formula():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    x, router = torch.randn(50, 6), torch.randn(3, 6, requires_grad=True)
    routing = Routing()
    for some in x.split(20):  # micro-batches of different sizes
        routing.read(some, router, training=True)
    theirs = load_balancing_loss_func((x @ router.T,), 3, 1) / 3  # they multiply by the experts
    theirs.backward()
    slope: Any = balance_slope(routing)
    assert torch.allclose(slope, router.grad, atol=1e-6)
    attached = filled(experts=3, balance=0.5)
    attached.model.train()
    logprobs(attached).sum().backward()
    slope = balance_slope(attached.routings[GATE])
    want = 0.5 / len(attached.routings) * slope
    assert torch.equal(attached.extra_grads(GATE)["router"], want) and not attached.extra_grads(UP)
    assert attached.parameters()[f"{GATE}.router"].grad is None  # unscaled: from balance alone


@pytest.mark.long
def test_two_domains_in_conflict_go_to_experts_of_their_own():
    """The first token marks the domain; the same inputs map to opposite outputs."""
    ends, split = {}, 0.0
    torch.manual_seed(0)
    content, target = torch.randn(64, 12), torch.randn(12, 32) / 3
    mark = torch.ones(64, 4)
    inputs = torch.cat([torch.cat([content, mark * s, torch.zeros(64, 16)], 1) for s in (1, -1)])
    want = torch.cat([content @ target, -content @ target])
    experts = {"experts": 2, "alpha": 4.0, "scaled": True}
    for name, settings in (("lora", {"lora_alpha": 4}), ("llava_mole", experts)):
        attached: Any = put(name, None, r=4, **settings)
        mlp = attached.model.model.layers[0].mlp
        inner = [p for n, p in attached.parameters().items() if "layers.0.mlp" in n]
        with torch.no_grad():
            start = mlp(inputs)
        optimizer = torch.optim.Adam(inner, lr=0.02)
        for _ in range(150):
            loss = (mlp(inputs) - start - want).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = float(loss.detach())
        if name == "llava_mole":
            choice = F.linear(inputs, attached.parameters()[f"{GATE}.router"]).argmax(-1).view(2, 64)
            share = choice.float().mean(1)
            split = float(torch.special.entr(torch.stack([share, 1 - share])).sum(0).mean())
    assert ends["llava_mole"] < 0.7 * ends["lora"], ends
    assert split < 0.5 * 0.693, split
