"""Weights there and back through codes."""

from __future__ import annotations

import torch

from helpers.tuners import base
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules
from luthier.registry import build


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(spec, W, dtype=torch.float32):
    q = build("quantizer", spec)
    return q.dequantize(q.quantize(W), tuple(W.shape), dtype)


def on_codes(kind: str = "llama", spec="nf4"):
    """A tiny network whose linear weights are codes, and the same with the weights that the codes stand
    for.
    """
    model, plain = base(kind), base(kind)
    quantize(model, build("quantizer", spec))
    for name, m in modules(model).items():
        plain.get_submodule(name).weight.data = m.weight.clone()
    return model, plain


def lq(**settings):
    one = {"num_bits_0": [3], "block_size_0": [64]}
    return build("quantizer", {"name": "lq_lora", "rank": 8, "target_bits": 4, **one, **settings})
