"""LoRA's update in the model's own precision: y + s (x A') B' without widening x, without W', with a backward
of its own.

PEFT carries x to the adapter's fp32 and multiplies there, which a chip with bf16 matrix units does several
times slower. The adapter itself stays in fp32; its gradients are summed in fp32 by the matrix units and
rounded once. `plain` is the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels import differentiated_otherwise
from luthier.kernels.prepacked import product

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
    """x W' + b and the update on it, W [out, in] frozen: what both add up to is never made twice, forward or
    backward.
    """
    if torch.compiler.is_compiling():
        return update(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if differentiated_otherwise():
        return plain(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if hasattr(weight, "packed") and not torch.is_grad_enabled():
        return update(x, product(x, weight, bias), A, B, scale)
    return _Linear.apply(x, weight, bias, A, B, scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
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
            found = again(
                lambda x, A, B: plain(x, nn.functional.linear(x, weight, bias), A, B, ctx.scale),
                (x, A, B),
                grads[0],
            )
            return found[0], None, None, *found[1:], None
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        a, b = A.to(x.dtype), (B * ctx.scale).to(x.dtype)
        inner = grad @ b if wants_x or wants_a else None
        d_x = (grad @ weight).addmm_(inner, a).view(x.shape) if wants_x else None
        return (
            d_x,
            None,
            None,
            *_factors(flat, grad, low, inner if wants_a else None, A, B, ctx.scale, wants_b),
            None,
        )


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
            found = again(
                lambda x, A, B: plain(x, torch.zeros_like(grads[0]), A, B, ctx.scale), (x, A, B), grads[0]
            )
            return found[0], d_y, *found[1:], None
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        inner = grad @ (B * ctx.scale).to(x.dtype) if wants_x or wants_a else None
        d_x = (inner @ A.to(x.dtype)).view(x.shape) if wants_x else None
        return (
            d_x,
            d_y,
            *_factors(flat, grad, low, inner if wants_a else None, A, B, ctx.scale, wants_b),
            None,
        )


def linears(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part | None], sizes: Sequence[int]
) -> Tensor:
    """The same for one row x [1, T, in], each stretch of whose places (`sizes`) has an update of its own, or
    none.
    """
    if torch.compiler.is_compiling() or differentiated_otherwise():
        return _stretches(x, weight, bias, parts, sizes, update if torch.compiler.is_compiling() else plain)
    factors = [t for part in parts for t in (part[:2] if part else (None, None))]
    return _Linears.apply(x, weight, bias, tuple(p[2] if p else 0.0 for p in parts), tuple(sizes), *factors)


def _stretches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Any,
    sizes: Sequence[int],
    way: Callable[..., Tensor],
) -> Tensor:
    """By operations that torch differentiates."""
    both = zip(
        x.split(list(sizes), -2),
        nn.functional.linear(x, weight, bias).split(list(sizes), -2),
        parts,
        strict=True,
    )
    return torch.cat([way(seen, own, *part) if part else own for seen, own, part in both], -2)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Any, sizes: Any, *factors: Any
    ) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        places = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        live = [i for i, A in enumerate(factors[::2]) if A is not None]
        ctx.places, ctx.ranks = [places[i] for i in live], [len(factors[2 * i]) for i in live]
        low = a = b = None
        if live:  # all factors are cast at once, [sum of ranks, in] and [sum of ranks, out]
            a = torch.cat([factors[2 * i] for i in live]).to(x.dtype)
            b = torch.cat([factors[2 * i + 1].T * scales[i] for i in live]).to(x.dtype)
            low = [flat[own] @ part.T for own, part in zip(ctx.places, a.split(ctx.ranks), strict=True)]
            for own, seen, part in zip(ctx.places, low, b.split(ctx.ranks), strict=True):
                out[own].addmm_(seen, part)
        ctx.save_for_backward(x, weight, bias, a, b, *factors, *(low or ()))
        ctx.live, ctx.scales, ctx.sizes = live, scales, sizes
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, *rest = ctx.saved_tensors
        factors, low = rest[: 2 * len(ctx.sizes)], rest[2 * len(ctx.sizes) :]
        if torch.is_grad_enabled():
            return _Linears.again(ctx, x, weight, bias, factors, grads[0])
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        d_x = grad @ weight if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(factors)
        if ctx.live:
            d_a, d_b = torch.empty_like(a), torch.empty_like(b)
            each = zip(ctx.places, low, *(t.split(ctx.ranks) for t in (a, b, d_a, d_b)), strict=True)
            for own, seen, part_a, part_b, to_a, to_b in each:
                inner = grad[own] @ part_b.T
                if d_x is not None:
                    d_x[own].addmm_(inner, part_a)
                torch.mm(inner.T, flat[own], out=to_a)
                torch.mm(seen.T, grad[own], out=to_b)
            wide = factors[2 * ctx.live[0]].dtype
            for i, of_a, of_b in zip(
                ctx.live, *(t.to(wide).split(ctx.ranks) for t in (d_a, d_b)), strict=True
            ):
                found[2 * i : 2 * i + 2] = of_a, of_b.T.mul(ctx.scales[i])
        return None if d_x is None else d_x.view(x.shape), None, None, None, None, *found

    @staticmethod
    def again(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        there = [f for f in factors if f is not None]

        def plainly(x: Tensor, *some: Tensor) -> Tensor:
            of = iter(some)
            parts = [
                None if A is None else (next(of), next(of), s)
                for A, s in zip(factors[::2], ctx.scales, strict=True)
            ]
            return _stretches(x, weight, bias, parts, ctx.sizes, plain)

        found = iter(again(plainly, (x, *there), grad))
        return next(found), None, None, None, None, *(None if f is None else next(found) for f in factors)


def _factors(
    flat: Tensor,
    grad: Tensor,
    low: Tensor,
    inner: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    wants_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B."""
    d_a = None if inner is None else (inner.T @ flat).to(A.dtype)
    d_b = (low.T @ grad).T.to(B.dtype, memory_format=torch.contiguous_format).mul_(scale) if wants_b else None
    return d_a, d_b


def again(f: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients that somebody will differentiate: through plain operations, from the inputs alone."""
    # each counts by itself, though one be made of another
    inputs = [x.view_as(x) if x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(f(*inputs), wanted, grad, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]
