"""A frozen matrix with LoRA on it as one step, against its plain twin."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.kernels import lora
from luthier.registry import build

SHAPES = {"x": (2, 5, 12), "weight": (7, 12), "bias": (7,), "A": (3, 12), "B": (7, 3)}


def given(asked, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(0)
    made = {
        k: torch.randn(s, generator=g).to(torch.float32 if k in "AB" else dtype).requires_grad_(k in asked)
        for k, s in SHAPES.items()
    }
    return made if bias else made | {"bias": None}


def plain(x, weight, bias, A, B, scale):
    return lora.plain(x, nn.functional.linear(x, weight, bias), A, B, scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("asked", ["xAB", "AB", "x", "B"])
def test_linear_is_its_plain_twin(asked, dtype, atol, bias):
    """Values and every gradient; in bf16 within the rounding of numbers around 30."""
    a, b = given(asked, dtype, bias), given(asked, dtype, bias)
    want, got = plain(**a, scale=0.7), lora.linear(**b, scale=0.7)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for out in (want, got):
        (out.float() * weight).sum().backward()
    assert got.dtype == want.dtype and torch.allclose(got.float(), want.float(), atol=atol)
    for name in asked:
        assert a[name].grad.dtype == b[name].grad.dtype
        assert torch.allclose(a[name].grad.float(), b[name].grad.float(), atol=atol), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_stretches_meet_their_own_updates(dtype, atol, bias):
    """One product for all, and A and B of a member for its places alone; one member has none, one has another
    rank.
    """
    sizes, ranks, found = (2, 1, 3, 4), (3, None, 2, 5), []
    for way in ("plain", "fast", "twice"):
        g = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randn(1, 10, 12, generator=g).to(dtype).requires_grad_(),
            torch.randn(7, 12, generator=g).to(dtype),
        )
        b = torch.randn(7, generator=g).to(dtype) if bias else None
        parts = [
            (
                None
                if r is None
                else (*(torch.randn(s, generator=g).requires_grad_() for s in ((r, 12), (7, r))), 0.2 * r)
            )
            for r in ranks
        ]
        moving = [x, *(t for part in parts if part for t in part[:2])]
        if way == "plain":
            each = zip(x.split(sizes, 1), parts, strict=True)
            y = torch.cat(
                [
                    plain(s, weight, b, *part) if part else nn.functional.linear(s, weight, b)
                    for s, part in each
                ],
                1,
            )
        else:
            y = lora.batched_linear(x, weight, b, parts, sizes)
        aim = torch.randn(y.shape, generator=g)
        found.append([y, *torch.autograd.grad((y.float() * aim).sum(), moving, create_graph=way == "twice")])
    for others in zip(*found, strict=True):
        for got in others[1:]:
            assert got.dtype == others[0].dtype and torch.allclose(
                got.float(), others[0].float(), atol=atol, rtol=atol / 20
            )


@pytest.mark.parametrize("way", ["linear", "update", "linears"])
def test_derivatives_of_every_kind(way):
    """Second ones, and those that torch.func takes forward."""
    x, weight, bias, A, B = (
        t.detach().double().requires_grad_(t.requires_grad) for t in given("xAB").values()
    )
    y = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = {
        "linear": lambda x, A, B: lora.linear(x, weight, bias, A, B, 0.7),
        "update": lambda x, A, B: lora.update(x, y, A, B, 0.7),
        "linears": lambda x, A, B: lora.batched_linear(
            x.view(1, 10, 12), weight, bias, [(A, B, 0.7), (B.T[:, :1] + A, B, 0.7)], (4, 6)
        ),
    }[way]
    slow = {
        "linear": lambda x, A, B: plain(x, weight, bias, A, B, 0.7),
        "update": lambda x, A, B: lora.plain(x, y, A, B, 0.7),
        "linears": lambda x, A, B: torch.cat(
            [
                plain(x.view(10, 12)[:4], weight, bias, A, B, 0.7),
                plain(x.view(10, 12)[4:], weight, bias, B.T[:, :1] + A, B, 0.7),
            ]
        )[None],
    }[way]
    second = []
    for f in (fast, slow):
        grads = torch.autograd.grad(f(x, A, B).sin().sum(), (x, A, B), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, A, B)))
    for got, want in zip(*second, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)
    ahead = [torch.func.jvp(f, (x, A, B), (x, A, B))[1] for f in (fast, slow)]
    torch.testing.assert_close(*ahead, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(12, 7), lambda: nn.Linear(12, 7, bias=False), lambda: Conv1D(7, 12)]
)
def test_a_layer_reads_as_peft_reads_it(make):
    from peft.tuners.lora import Linear as Theirs

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = make()

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(0)
    net = Net()
    attached = build("tuner", {"name": "lora", "r": 3, "target_modules": ["inner"]}).attach(net)
    nn.init.normal_(net.inner.lora_B["default"].weight)
    layer, x, grads = net.inner, torch.randn(4, 12, requires_grad=True), []
    for forward in (type(layer).forward, Theirs.forward):
        out = forward(layer, x)
        grads.append((out, *torch.autograd.grad(out.sin().sum(), (x, *attached.parameters().values()))))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_batch_in_another_thread_takes_nothing_away():
    """Factors are cast once a batch, though a batch elsewhere ends meanwhile."""
    rng = torch.Generator().manual_seed(0)
    A, x = torch.randn(2, 6, generator=rng), torch.randn(3, 6, generator=rng).bfloat16()

    def elsewhere():
        with lora.CASTS.once():
            lora.CASTS.of(A, 0.5, x.dtype)

    with lora.CASTS.once():
        cast, scaled = lora.CASTS.of(A, 0.5, x.dtype)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        again = lora.CASTS.of(A, 0.5, x.dtype)
        assert again[0] is cast and again[1] is scaled
        assert torch.equal(lora.CASTS.low(x, A, scaled), x @ scaled.T)
