"""gptq: errs less on what the layer reads."""

from __future__ import annotations

import torch

from helpers.quantizers import normal
from luthier.registry import build


def test_gptq_errs_less_on_what_the_layer_reads():
    mix = normal(96, 96, seed=5) * torch.logspace(0, -2, 96)
    X = normal(96, 400, seed=6)
    H = (mix @ X) @ (mix @ X).T
    W = normal(32, 96, seed=7)
    for bits in (2, 3, 4):
        q = build("quantizer", {"name": "gptq", "bits_per_weight": bits, "group_size": 48})
        off = lambda codes, q=q: float(
            ((q.dequantize(codes, (32, 96), torch.float32) - W) @ mix @ X).square().sum()
        )
        assert off(q.quantize(W, H)) < 0.7 * off(q.quantize(W))
    alone = torch.eye(96) * 3  # inputs that have nothing to do with each other: nothing can be repaired
    assert torch.allclose(
        q.dequantize(q.quantize(W, alone), (32, 96), torch.float32),
        q.dequantize(q.quantize(W), (32, 96), torch.float32),
    )
