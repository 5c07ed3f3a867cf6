"""LoRA's update in the model's own precision: y + s (x A') B' without widening x, without W', with a backward of its own.

PEFT carries x to the adapter's fp32 and multiplies there, which a chip with bf16 matrix units does several times slower.
The adapter itself stays in fp32; its gradients are summed in fp32 by the matrix units and rounded once. `plain` is the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels import differentiated_otherwise
from luthier.kernels.packed import product

Part = tuple[Tensor, Tensor, float]  # A, B, scale


def plain(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """[.., in], [.., out], [r, in], [out, r] -> [.., out]: the obvious way, in the adapter's precision."""
    return (y.to(A.dtype) + (x.to(A.dtype) @ A.T) @ B.T * scale).to(y.dtype)


def update(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same in the precision of x and y."""
    if torch.compiler.is_compiling():
        return y + (x @ A.to(x.dtype).T) @ (B * scale).to(x.dtype).T
    return plain(x, y, A, B, scale) if differentiated_otherwise() else _Update.apply(x, y, A, B, scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W' + b and the update on it, W [out, in] frozen: what both add up to is never made twice, forward or backward."""
    if torch.compiler.is_compiling():
        return update(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if differentiated_otherwise():
        return plain(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if hasattr(weight, "packed") and not torch.is_grad_enabled():
        return update(x, product(x, weight, bias), A, B, scale)
    return _Linear.apply(x, weight, bias, A, B, scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), (B * scale).to(x.dtype)
        low = flat @ a.T
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        ctx.save_for_backward(x, weight, bias, A, B, low)
        ctx.scale = scale
        return y.addmm_(low, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, low = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = again(lambda x, A, B: plain(x, nn.functional.linear(x, weight, bias), A, B, ctx.scale), (x, A, B), grads[0])
            return found[0], None, None, *found[1:], None
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        a, b = A.to(x.dtype), (B * ctx.scale).to(x.dtype)
        inner = grad @ b if wants_x or wants_a else None
        d_x = (grad @ weight).addmm_(inner, a).view(x.shape) if wants_x else None
        return d_x, None, None, *_factors(flat, grad, low, inner if wants_a else None, A, B, ctx.scale, wants_b), None


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ A.to(x.dtype).T
        ctx.save_for_backward(x, A, B, low)
        ctx.scale = scale
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, (B * scale).to(x.dtype).T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, low = ctx.saved_tensors
        wants_x, wants_y, wants_a, wants_b, _ = ctx.needs_input_grad
        d_y = grads[0] if wants_y else None
        if torch.is_grad_enabled():
            found = again(lambda x, A, B: plain(x, torch.zeros_like(grads[0]), A, B, ctx.scale), (x, A, B), grads[0])
            return found[0], d_y, *found[1:], None
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        inner = grad @ (B * ctx.scale).to(x.dtype) if wants_x or wants_a else None
        d_x = (inner @ A.to(x.dtype)).view(x.shape) if wants_x else None
        return d_x, d_y, *_factors(flat, grad, low, inner if wants_a else None, A, B, ctx.scale, wants_b), None


def linears(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part | None], sizes: Sequence[int]) -> Tensor:
    """The same for one row x [1, T, in], each stretch of whose places (`sizes`) has an update of its own, or none."""
    if torch.compiler.is_compiling() or differentiated_otherwise():
        return _stretches(x, weight, bias, parts, sizes, update if torch.compiler.is_compiling() else plain)
    factors = [t for part in parts for t in (part[:2] if part else (None, None))]
    return _Linears.apply(x, weight, bias, tuple(p[2] if p else 0.0 for p in parts), tuple(sizes), *factors)


def _stretches(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Any, sizes: Sequence[int], way: Callable[..., Tensor]) -> Tensor:
    """By operations that torch differentiates."""
    both = zip(x.split(list(sizes), -2), nn.functional.linear(x, weight, bias).split(list(sizes), -2), parts, strict=True)
    return torch.cat([way(seen, own, *part) if part else own for seen, own, part in both], -2)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Any, sizes: Any, *factors: Any) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        kept: list[Tensor | None] = []
        for seen, own, A, B, scale in zip(x.split(sizes, -2), y.split(sizes, -2), factors[::2], factors[1::2], scales, strict=True):
            if A is None:
                kept += None, None, None
                continue
            a, b, seen = A.to(x.dtype), (B * scale).to(x.dtype), seen.reshape(-1, seen.shape[-1])
            kept += a, b, (low := seen @ a.T)
            own.view(-1, own.shape[-1]).addmm_(low, b.T)
        ctx.save_for_backward(x, weight, bias, *factors, *kept)
        ctx.scales, ctx.sizes = scales, sizes
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *rest = ctx.saved_tensors
        factors, kept, sizes = rest[: 2 * len(ctx.sizes)], rest[2 * len(ctx.sizes) :], ctx.sizes
        if torch.is_grad_enabled():
            return _Linears.again(ctx, x, weight, bias, factors, grads[0])
        d_x = grads[0] @ weight if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for i, (seen, grad) in enumerate(zip(x.split(sizes, -2), grads[0].split(sizes, -2), strict=True)):
            A, B, (a, b, low) = factors[2 * i], factors[2 * i + 1], kept[3 * i : 3 * i + 3]
            if a is None:
                found += None, None
                continue
            seen, grad = seen.reshape(-1, seen.shape[-1]), grad.reshape(-1, grad.shape[-1])
            wants_a, wants_b = ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i]
            inner = grad @ b if wants_a or d_x is not None else None
            if d_x is not None:
                d_x.split(sizes, -2)[i].view(-1, x.shape[-1]).addmm_(inner, a)
            found += _factors(seen, grad, low, inner if wants_a else None, A, B, ctx.scales[i], wants_b)
        return d_x, None, None, None, None, *found

    @staticmethod
    def again(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        there = [f for f in factors if f is not None]

        def plainly(x: Tensor, *some: Tensor) -> Tensor:
            of = iter(some)
            parts = [None if A is None else (next(of), next(of), s) for A, s in zip(factors[::2], ctx.scales, strict=True)]
            return _stretches(x, weight, bias, parts, ctx.sizes, plain)

        found = iter(again(plainly, (x, *there), grad))
        return next(found), None, None, None, None, *(None if f is None else next(found) for f in factors)


def _factors(
    flat: Tensor, grad: Tensor, low: Tensor, inner: Tensor | None, A: Tensor, B: Tensor, scale: float, wants_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B."""
    d_a = None if inner is None else (inner.T @ flat).to(A.dtype)
    d_b = (low.T @ grad).T.to(B.dtype, memory_format=torch.contiguous_format).mul_(scale) if wants_b else None
    return d_a, d_b


def again(f: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients that somebody will differentiate: through plain operations, from the inputs alone."""
    inputs = [x.view_as(x) if x.requires_grad else x for x in inputs]  # each counts by itself, though one be made of another
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(f(*inputs), wanted, grad, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]
