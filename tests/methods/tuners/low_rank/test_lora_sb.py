"""lora_sb: starts as the first full step; with all directions is full tuning; exports exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from helpers.tuners import as_roles, base, batch, logprobs, plain, put, train
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.registry import build


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_sb_starts_as_the_first_full_step(kind):
    attached = put("lora_sb", base(kind), r=4, first_step=1e-2)
    before = {n: p.clone() for n, p in attached.model.named_parameters()}
    attached.initialize([{}], as_roles(attached))
    full = base(kind)
    Causal().forward(full, Untuned(full), batch()).logprobs.mean().neg().backward()
    for name, layer in attached.layers.items():
        p = layer.tensors("default")
        grad = full.get_submodule(name).weight.grad
        grad = grad.T if kind == "gpt2" else grad
        U, S, Vh = torch.linalg.svd(-1e-2 * grad.sign())
        assert torch.allclose(p.B @ p.R @ p.A, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-4)
        assert torch.allclose(p.B.T @ p.B, torch.eye(4), atol=1e-5) and torch.allclose(
            p.A @ p.A.T, torch.eye(4), atol=1e-5
        )
        assert p.R.shape == (4, 4) and p.R.requires_grad and not p.A.requires_grad
        W = layer.get_base_layer().weight.detach().clone().requires_grad_(True)
        assert not layer.get_base_layer().weight.requires_grad
        Wo = W.T if kind == "gpt2" else W
        x = torch.randn(5, Wo.shape[1])
        out = torch.nn.functional.linear(x, attached.settings.weight(Wo, p)).square().sum()
        gR, gW = torch.autograd.grad(out, [p.R, W])
        gW = gW.T if kind == "gpt2" else gW  # autograd's gradient of W', at the same place
        assert torch.allclose(gR, p.B.T @ gW @ p.A.T, rtol=1e-4, atol=1e-4)
    names_ = {id(p) for p in attached.parameters().values()}
    assert all(torch.equal(p, before[n]) for n, p in attached.model.named_parameters() if id(p) not in names_)
    assert logprobs(attached).mean() > logprobs(Untuned(full)).mean()


def test_lora_sb_with_all_directions_is_full_tuning():
    """For a square W and r its side, one SGD step on R is the SGD step on W."""
    method = build("tuner", {"name": "lora_sb", "r": 8})
    torch.manual_seed(0)
    W, x, target = torch.randn(8, 8), torch.randn(5, 8), torch.randn(5, 8)
    loss = lambda w: (x @ w.T - target).square().mean()
    grad = torch.autograd.functional.jacobian(loss, W)
    p = {k: v[1] if isinstance(v, tuple) else v for k, v in method.init(W).items()} | method.start(W, grad)
    R = p.pop("R").clone().requires_grad_(True)
    start = method.weight(W, SimpleNamespace(R=R, **p))
    loss(start).backward()
    stepped = method.weight(W, SimpleNamespace(R=R - 0.1 * R.grad, **p))
    at = start.detach().requires_grad_(True)
    assert torch.allclose(stepped, at - 0.1 * torch.autograd.grad(loss(at), at)[0], atol=1e-4)


@torch.no_grad()
def test_lora_sb_exports_exactly(tmp_path):
    attached = put("lora_sb")
    with torch.enable_grad():
        attached.initialize([{}], as_roles(attached))
        train(attached)
    assert attached.export_lora(tmp_path) == 0.0
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path).eval()), plain(attached.model), atol=1e-5
    )


def test_lora_sb_is_ahead_of_factors_of_the_weight():
    """LoRA-XS is the same form with the SVD of W in place of that of the first step."""
    for seed in range(3):
        torch.manual_seed(seed)
        W, x = torch.randn(16, 16), torch.randn(200, 16)
        target = x @ (W + torch.randn(16, 4) @ torch.randn(4, 16)).T
        sides = {}
        for name in ("sb", "xs"):
            method = build("tuner", {"name": "lora_sb", "r": 4, "first_step": 1e-3})
            grad = 2 * (x @ W.T - target).T @ x / target.numel()
            U, _, Vh = torch.linalg.svd(W)
            p = (
                method.start(W, grad)
                if name == "sb"
                else {"B": U[:, :4], "A": Vh[:4], "R": torch.zeros(4, 4)}
            )
            R = p.pop("R").clone().requires_grad_(True)
            optimizer = torch.optim.Adam([R], 0.05)
            for _ in range(100):
                optimizer.zero_grad()
                loss = (x @ method.weight(W, SimpleNamespace(R=R, **p)).T - target).square().mean()
                loss.backward()
                optimizer.step()
            sides[name] = float(loss)
        assert sides["sb"] < sides["xs"], sides
