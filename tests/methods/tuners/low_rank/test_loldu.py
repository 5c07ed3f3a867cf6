"""loldu: loldu."""

from __future__ import annotations

import torch

from helpers.tuners import put
from helpers.weight_tuners import numbers
from luthier.registry import build


def test_loldu():
    torch.manual_seed(0)
    for shape in ((6, 6), (5, 9), (9, 5)):
        W = torch.randn(shape)
        method = build("tuner", {"name": "loldu", "r": 9, "lora_alpha": 18})
        p = numbers(method.init(W))
        # with all entries nothing is left over
        assert torch.allclose(p.L @ torch.diag(p.z) @ p.U, W, atol=1e-4)
        method = build("tuner", {"name": "loldu", "r": 3, "lora_alpha": 6})
        p = numbers(method.init(W))
        assert p.z.numel() + p.scale.numel() == 4 and torch.allclose(method.weight(W, p), W, atol=1e-6)
        G = torch.randn(shape)
        (method.weight(W, p) * G).sum().backward()
        assert torch.allclose(p.z.grad, 2.0 * (p.L.T @ G @ p.U.T).diagonal(), atol=1e-4)
    attached = put("loldu", r=8)
    assert sum(p.numel() for p in attached.parameters().values()) == 9 * len(attached.layers)
