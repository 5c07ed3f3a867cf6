"""awq: errs less where some inputs are large."""

from __future__ import annotations

import torch

from helpers.quantizers import normal
from luthier.registry import build


def test_awq_errs_less_where_some_inputs_are_large():
    X = normal(96, 400, seed=6)
    X[:3] *= 30  # three salient channels
    W = normal(32, 96, seed=7)
    for bits in (2, 3, 4):
        settings = {"bits_per_weight": bits, "group_size": 48}
        rtn, awq = (build("quantizer", {"name": name, **settings}) for name in ("rtn", "awq"))
        off = lambda q, codes: float(((q.dequantize(codes, (32, 96), torch.float32) - W) @ X).square().sum())
        codes = awq.quantize(W, X @ X.T)
        assert off(awq, codes) < 0.5 * off(rtn, rtn.quantize(W))
        assert round(awq.bits((32, 96)) * W.numel()) == 8 * sum(t.nbytes for t in codes.values())
        # of what the codes stand for, the same codes are the nearest
        again = awq.nearest(awq.dequantize(codes, (32, 96), torch.float32), codes)
        assert (again["weight"] == codes["weight"]).float().mean() > 0.99
    even = awq.quantize(W, 3 * torch.eye(96))  # no channel stands out
    assert torch.allclose(
        awq.dequantize(even, (32, 96), torch.float32),
        rtn.dequantize(rtn.quantize(W), (32, 96), torch.float32),
        atol=1e-3,
    )
