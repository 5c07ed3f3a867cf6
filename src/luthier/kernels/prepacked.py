"""Weights of a network that decodes on a CPU, laid out once as its bf16 products read them, and not anew at
every token.

A product of few rows spends a tenth (32 rows) to two fifths (6 rows) of its time on laying out the weight.
What comes out is the same bit for bit. Weights take twice the memory while they are prepacked, so large
networks are left as they are, and compiled ones, whose products are the compiler's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST = 2**29  # bytes of weights up to which a network is prepacked


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """For a while, with no gradient: linear modules of bf16 have their weight laid out for products of few
    rows.
    """
    usable = is_supported() and all(m._compiled_call_impl is None for m in model.modules())
    modules: list[Any] = []
    size = 0
    for module in model.modules():
        if type(module) is not nn.Linear or not usable:
            continue
        if module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            modules.append(module)
            size += module.weight.nbytes
    if size > MOST:
        modules = []
    for module in modules:
        weight = module.weight
        weight.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        module.forward = partial(product, weight=weight, bias=module.bias)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
            if hasattr(module.weight, "prepacked"):  # tied weights are one
                del module.weight.prepacked


def is_supported() -> bool:
    """Does this torch know such layouts, and the chip bf16?"""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.enabled:
        return False
    return torch.cpu._is_avx512_bf16_supported()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b, W prepacked or not."""
    layout = getattr(weight, "prepacked", None)
    if layout is None or torch.is_grad_enabled():
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")
