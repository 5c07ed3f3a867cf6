"""Weights of a network that writes on a CPU, laid out once as its bf16 products read them, and not anew at
every token.

A product of few rows spends a tenth (32 rows) to two fifths (6 rows) of its time on laying out the weight.
What comes out is the same bit for bit. Weights take twice the memory while they are packed, so large networks
are left as they are, and compiled ones, whose products are the compiler's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels import compiled

MOST = 2**29  # bytes of weights up to which a network is packed


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """For a while, with no gradient: linear modules of bf16 have their weight laid out for products of few
    rows.
    """
    linear = [
        m
        for m in model.modules()
        if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16 and m.weight.device.type == "cpu"
    ]
    if not able() or compiled.within(model) or sum(m.weight.nbytes for m in linear) > MOST:
        linear = []
    for m in linear:
        m.weight.packed = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), None)  # type: ignore[attr-defined]
        m.forward = partial(_forward, m)
    try:
        yield
    finally:
        for m in linear:
            del m.forward
            if hasattr(m.weight, "packed"):  # tied weights are one
                del m.weight.packed


def able() -> bool:
    """Does this torch know such layouts, and the chip bf16?"""
    own = torch.ops.mkldnn
    known = hasattr(own, "_linear_pointwise") and bool(torch.backends.mkldnn.enabled)
    return known and torch.cpu._is_avx512_bf16_supported()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b, W packed or not."""
    laid_out = getattr(weight, "packed", None)
    if laid_out is None or torch.is_grad_enabled():
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


def _forward(module: Any, x: Tensor) -> Tensor:
    return product(x, module.weight, module.bias)
