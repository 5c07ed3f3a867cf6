"""compacter: is its kronecker sums; learns what an adapter learns with few numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.tuners import logprobs, put
from helpers.weight_tuners import One, descend, numbers, to_end
from luthier.errors import RecipeError
from luthier.registry import build


def test_compacter_is_its_kronecker_sums():
    attached, shape = put("compacter", reduction_factor=4, phm_dim=4, phm_rank=2), (32, 8)
    layers, n, r = attached.layers, 4, 2
    assert len(layers) == 4
    assert sum(p.numel() for p in attached.parameters().values()) == n**3 + len(layers) * (
        2 * r * sum(shape) + sum(shape)
    )
    held = [layer.adapter_params["default"] for layer in layers.values()]
    assert len({id(h.A) for h in held}) == 1  # one parameter, whose gradient is the sum of all
    torch.manual_seed(1)
    for k, p in attached.parameters().items():
        p.data.normal_(std=0.5 if k.endswith("A") else 0.3)
    layer, x = layers["model.layers.0.self_attn.o_proj"], torch.randn(3, 32)
    p, y = layer.tensors("default"), layer.base_layer(x)
    down, up = (
        sum(torch.kron(p.A[i], s[i] @ t[i]) for i in range(n))
        for s, t in ((p.down_s, p.down_t), (p.up_s, p.up_t))
    )
    assert down.shape == (8, 32) and up.shape == (32, 8)
    want = y + nn.functional.gelu(y @ down.T + p.down_bias) @ up.T + p.up_bias
    assert torch.allclose(layer(x), want, atol=1e-5)
    logprobs(attached).mean().backward()
    whole = held[0].A.grad.clone()
    for h in held:
        h.A = nn.Parameter(held[0].A.detach().clone())
    logprobs(attached).mean().backward()
    assert torch.allclose(whole, sum(h.A.grad for h in held), atol=1e-6) and (held[1].A.grad != 0).any()
    one = build("tuner", {"name": "compacter", "phm_dim": 1, "reduction_factor": 4})
    q = numbers(one.init(torch.zeros(32, 32)))
    assert torch.allclose(one.maps(q)[0], q.A[0, 0, 0] * q.down_s[0] @ q.down_t[0])  # of rank one
    with pytest.raises(RecipeError, match="phm_dim: 5 does not divide the width of a module, 32"):
        put("compacter", phm_dim=5)


@pytest.mark.long
def test_compacter_learns_what_an_adapter_learns_with_few_numbers():
    """A bump along one direction behind a linear map, under noise."""
    ends, numbers_ = {}, {}
    for name, more in (("compacter", {"phm_dim": 4}), ("houlsby", {"non_linearity": "gelu"})):
        torch.manual_seed(0)
        net = One(torch.randn(128, 128) / 128**0.5)
        u, v = torch.randn(128), torch.randn(128) / 128**0.5
        attached = build(
            "tuner", {"name": name, "target_modules": ["fc"], "reduction_factor": 4, **more}
        ).attach(net)

        def loss(n=256, net=net, u=u, v=v, tuned=attached):
            x = torch.randn(n, 128)
            with torch.no_grad(), tuned.off():
                y = net(x)
            return (net(x) - y - nn.functional.gelu(y @ v)[:, None] * u - torch.randn_like(y)).square().mean()

        start = loss(4096).item()
        to_end(descend(attached, loss, 300, 0.02 if name == "compacter" else 3e-3))
        ends[name], numbers_[name] = (
            loss(4096).item(),
            sum(p.numel() for p in attached.parameters().values() if p.ndim > 1),
        )
        assert ends[name] < 0.9 * start
    assert ends["compacter"] < 1.1 * ends["houlsby"] and numbers_["compacter"] < 0.05 * numbers_["houlsby"], (
        ends,
        numbers_,
    )
