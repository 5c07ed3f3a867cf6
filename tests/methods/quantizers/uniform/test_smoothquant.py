"""smoothquant: smoothing helps where an input is an outlier; inputs are rounded token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.quantizers import normal, on_codes
from luthier.model.quantized_linear import modules
from luthier.registry import build


def test_smoothing_helps_where_an_input_is_an_outlier():
    x, W = normal(200, 64, seed=1), normal(48, 64, seed=2)
    x[:, 5] *= 60
    errors = {}
    for strength in (0.0, 0.5):
        q = build("quantizer", {"name": "smoothquant", "migration_strength": strength})
        codes = q.quantize(W, x.abs().amax(0))
        out = F.linear(q.inputs(x, codes), q.dequantize(codes, (48, 64), torch.float32))
        errors[strength] = float((out - x @ W.T).square().mean())
    assert errors[0.5] < 0.1 * errors[0.0]
    s = codes["input_scale"]  # the paper's scales
    assert torch.allclose(s, (x.abs().amax(0) / W.abs().amax(0)).sqrt())


def test_inputs_are_rounded_token_by_token():
    q = build("quantizer", {"name": "smoothquant"})
    x, W = normal(7, 64, seed=3).requires_grad_(True), normal(48, 64, seed=2)
    codes = q.quantize(W, x.detach().abs().amax(0))
    read = q.inputs(x, codes)
    steps = (read.detach() / codes["input_scale"]) / (
        (x.detach() / codes["input_scale"]).abs().amax(1) / 127
    )[:, None]
    assert torch.allclose(steps, steps.round(), atol=1e-3) and float(steps.abs().max()) <= 127.001
    read.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # straight through
    model, plain = on_codes("llama", {"name": "smoothquant"})
    name, m = next(iter(modules(model).items()))
    x = normal(3, m.size[1])
    expected = F.linear(q.inputs(x, m.codes), plain.get_submodule(name).weight)
    assert torch.allclose(m(x), expected, atol=1e-5)
