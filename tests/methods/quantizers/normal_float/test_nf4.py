"""nf4: is the published table; errs less than fp4 and int4 on normal weights; double quantization costs an
eighth and little error; the dynamic map.
"""

from __future__ import annotations

import pytest
import torch

from helpers.quantizers import normal, there_and_back
from luthier.methods.quantizers.codebook._book import dynamic_map, normal_float
from luthier.registry import build

NF4 = (  # appendix E of arXiv:2305.14314
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def test_nf4_is_the_published_table():
    assert torch.allclose(torch.tensor(normal_float(4)), torch.tensor(NF4), atol=1e-6)
    assert [len(normal_float(b)) for b in (2, 3, 8)] == [4, 8, 256] and all(
        0.0 in normal_float(b) for b in (2, 3, 4, 8)
    )


def test_nf4_errs_less_than_fp4_and_int4_on_normal_weights():
    W = normal(256, 1024)
    error = {
        n: float((there_and_back({"name": n, "double_quant": False}, W) - W).abs().mean())
        for n in ("nf4", "fp4")
    }
    blocks = W.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    error["int4"] = float(((blocks / scale).round() * scale - blocks).abs().mean())
    assert error["nf4"] < error["int4"] and error["nf4"] < error["fp4"]


def test_double_quantization_costs_an_eighth_and_little_error():
    W = normal(512, 2048) * 0.02
    once, twice = (build("quantizer", {"name": "nf4", "double_quant": d}) for d in (False, True))
    assert once.bits(W.shape) == 4.5 and twice.bits(W.shape) == pytest.approx(4.127, abs=5e-4)
    a, b = (q.quantize(W) for q in (once, twice))
    assert torch.equal(a["weight"], b["weight"])
    from luthier.methods.quantizers.codebook._book import unsqueeze

    off = (unsqueeze(b) - a["absmax"]).abs()
    spread = (a["absmax"] - a["absmax"].mean()).abs().max()
    # half the widest gap of the map
    assert off.max() <= spread * float(dynamic_map().diff().max()) / 2 + 1e-7
    gap = (once.dequantize(a, W.shape, torch.float32) - twice.dequantize(b, W.shape, torch.float32)).norm()
    assert gap < 0.02 * W.norm()


def test_the_dynamic_map():
    table = dynamic_map()
    assert (
        len(table) == 256
        and len(table.unique()) == 256
        and table[0] == pytest.approx(-0.9929687)
        and table[-1] == 1
    )
    assert (table.abs() < 1e-3).sum() > 20  # dense toward zero
