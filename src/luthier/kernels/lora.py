"""LoRA's update in the model's own precision: y + s (x A') B' without widening x, without W', with a backward of its own.

PEFT carries x to the adapter's fp32 and multiplies there, which a chip with bf16 matrix units does several times slower.
The adapter itself stays in fp32; its gradients are summed in fp32 by the matrix units and rounded once. `plain` is the twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """[.., in], [.., out], [r, in], [out, r] -> [.., out]: the obvious way, in the adapter's precision."""
    return (y.to(A.dtype) + (x.to(A.dtype) @ A.T) @ B.T * scale).to(y.dtype)


def update(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same in the precision of x and y."""
    return _Update.apply(x, y, A, B, scale)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), (B * scale).to(x.dtype)
        low = flat @ a.T
        ctx.save_for_backward(flat, a, b, low)
        ctx.scale, ctx.kinds = scale, (A.dtype, B.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, low = ctx.saved_tensors
        wants_x, wants_y, wants_a, wants_b, _ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inner = grad @ b if wants_x or wants_a else None
        d_x = (inner @ a).view(*grads[0].shape[:-1], a.shape[1]) if wants_x else None
        d_a = (inner.T @ flat).to(ctx.kinds[0]) if wants_a else None
        d_b = (grad.T @ low).to(ctx.kinds[1]).mul_(ctx.scale) if wants_b else None
        return d_x, grads[0] if wants_y else None, d_a, d_b, None
