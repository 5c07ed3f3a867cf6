"""allora: LoRA's values, and gradients of each output by its own coefficient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.registry import build

ETA = 3.0


def factors(seed=0, scale=1.0):
    torch.manual_seed(seed)
    A, B = torch.randn(2, 6), scale * torch.randn(5, 2)
    return SimpleNamespace(A=A.requires_grad_(), B=B.requires_grad_())


def gradients(forward, p):
    """Of A and B, for one loss on outputs."""
    torch.manual_seed(7)
    x, y, weights = torch.randn(4, 6), torch.randn(4, 5), torch.randn(4, 5)
    out = forward(x, y, p)
    return out, torch.autograd.grad((out * weights).sum(), [p.A, p.B])


def allora(x, y, p):
    return build("tuner", {"name": "allora", "r": 2, "eta": ETA}).forward(x, y, p, None)


def lora(x, y, p):
    return y + (x @ p.A.T) @ p.B.T


def by_rows(coefficients):
    """LoRA whose outputs' gradients are multiplied, by a value that cancels."""

    def forward(x, y, p):
        u = (x @ p.A.T) @ p.B.T
        return y + u * coefficients + (u * (1 - coefficients)).detach()

    return forward


def test_values_are_loras():
    p = factors()
    assert torch.equal(gradients(allora, p)[0], gradients(lora, p)[0])
    method = build("tuner", {"name": "allora", "r": 2})
    W = torch.randn(5, 6)
    assert torch.equal(method.weight(W, p), W + p.B @ p.A)


def test_at_the_start_gradients_are_eta_times_loras():
    p = factors(scale=0.0)
    (_, ours), (_, plain) = gradients(allora, p), gradients(lora, p)
    assert torch.allclose(ours[1], ETA * plain[1], atol=1e-5)
    assert not ours[0].any()


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_each_row_times_its_coefficient(seed):
    p = factors(seed)
    c = 1 / ((p.B @ p.A).detach().norm(dim=1) + 1 / ETA**2).sqrt()
    (_, ours), (_, plain) = gradients(allora, p), gradients(by_rows(c), p)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, plain, strict=True))
    assert torch.allclose(ours[1], c[:, None] * gradients(lora, p)[1][1], rtol=1e-5, atol=1e-6)
    method = build("tuner", {"name": "allora", "r": 2, "eta": ETA})
    torch.manual_seed(8)
    weights = torch.randn(5, 6)
    through = torch.autograd.grad((method.weight(torch.zeros(5, 6), p) * weights).sum(), p.B)[0]
    assert torch.allclose(through, (c[:, None] * weights) @ p.A.T, rtol=1e-5, atol=1e-6)


def test_the_coefficient_falls_as_a_row_grows():
    method = build("tuner", {"name": "allora", "eta": ETA})
    sizes = [float(method.factors_of_rows(factors(scale=s))[0]) for s in (0.0, 0.1, 1.0, 10.0)]
    assert sizes[0] == pytest.approx(ETA) and sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
