"""ggpo: without noise is lora; noise has the spread it says."""

from __future__ import annotations

import torch

from helpers.tuners import logprobs
from helpers.weight_tuners import Q, walk
from luthier.registry import build


def test_ggpo_without_noise_is_lora():
    one, _, _ = walk({"name": "ggpo", "sigma": 0.0, "beta": 0.0})
    two, _, _ = walk("backprop")
    noisy, chain, seen = walk("ggpo")
    assert all(torch.equal(v, two.tensors()[k]) for k, v in one.tensors().items())
    assert any(not torch.equal(v, two.tensors()[k]) for k, v in noisy.tensors().items())
    with torch.no_grad():
        assert torch.equal(logprobs(noisy), logprobs(noisy))  # measuring is without noise
    (A, gA), (B, gB) = seen[f"{Q}.A"], seen[f"{Q}.B"]
    assert torch.allclose(chain.state[Q]["ggpo"]["rows"], (4.0 * (B @ gA + gB @ A)).norm(dim=1), atol=1e-6)


def test_ggpo_noise_has_the_spread_it_says():
    from luthier.methods.estimators.sharpness.ggpo import noisy

    torch.manual_seed(0)
    attached, chain, _ = walk("ggpo", 1)
    layer, group = attached.layers[Q], next(s for s in chain.param_groups() if s.name == Q)
    rows = torch.rand(32)
    size = build("estimator", {"name": "ggpo", "sigma": 0.5, "beta": 0.1}).size(layer, group.params, rows)
    W = layer.get_base_layer().weight
    change = (4.0 * group.params["B"] @ group.params["A"]).norm(dim=1)
    want = (0.5 * (W.norm(dim=1).mean().square() + change.square()).sqrt() + 0.1 * rows.square()) / 32**0.5
    assert torch.allclose(size, want, atol=1e-6)
    x = torch.randn(1, 32, requires_grad=True)
    said = torch.stack([noisy(x, torch.zeros(1, 32), size, k)[0] for k in range(5000)]).detach()
    assert float((said.std(0) / (x.norm() * size) - 1).abs().mean()) < 0.03
    y = noisy(x, torch.zeros(1, 32), size, 0)  # what backward draws is what forward drew
    assert torch.allclose((torch.autograd.grad(y.sum(), x)[0] * x).sum(), y.sum(), atol=1e-5)
