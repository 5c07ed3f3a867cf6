"""LoRA's update in the model's own precision: y + s (x A') B' without widening x, without W', with a backward
of its own.

PEFT carries x to the adapter's fp32 and multiplies there, which a chip with bf16 matrix units does several
times slower. The adapter itself stays in fp32; its gradients are summed in fp32 by the matrix units and
rounded once. `plain` is the twin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from luthier.kernels._switch import differentiated_otherwise
from luthier.kernels.prepacked import product

Part = tuple[Tensor, Tensor, float]  # A [r, in], B [out, r], scale


def plain(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """[.., in], [.., out], [r, in], [out, r] -> [.., out]: the obvious way, in the adapter's precision."""
    return (y.to(A.dtype) + (x.to(A.dtype) @ A.T) @ B.T * scale).to(y.dtype)


def update(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same in the precision of x and y."""
    if torch.compiler.is_compiling():
        return y + (x @ A.to(x.dtype).T) @ (B * scale).to(x.dtype).T
    if differentiated_otherwise():
        return plain(x, y, A, B, scale)
    if x.is_cuda:
        return _OnDevice.apply(x, y, None, None, A, B, scale)
    return _Update.apply(x, y, A, B, scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W' + b and the update on it, W [out, in] frozen: what both add up to is never made twice, forward or
    backward.
    """
    if torch.compiler.is_compiling():
        return update(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if differentiated_otherwise():
        return plain(x, nn.functional.linear(x, weight, bias), A, B, scale)
    if hasattr(weight, "prepacked") and not torch.is_grad_enabled():
        return update(x, product(x, weight, bias), A, B, scale)
    if x.is_cuda:
        return _OnDevice.apply(x, None, weight, bias, A, B, scale)
    return _Linear.apply(x, weight, bias, A, B, scale)


def batched_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part | None], sizes: Sequence[int]
) -> Tensor:
    """The same for one row x [1, T, in], each stretch of whose positions (`sizes`) has an update of its own,
    or none.
    """
    if torch.compiler.is_compiling():
        return _stretch_by_stretch(x, weight, bias, parts, sizes, update)
    if differentiated_otherwise():
        return _stretch_by_stretch(x, weight, bias, parts, sizes, plain)
    factors: list[Tensor | None] = []
    scales: list[float] = []
    for part in parts:
        A, B, scale = part or (None, None, 0.0)
        factors += A, B
        scales.append(scale)
    return _BatchedLinear.apply(x, weight, bias, tuple(scales), tuple(sizes), *factors)


def _stretch_by_stretch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Sequence[Part | None],
    sizes: Sequence[int],
    way: Callable[..., Tensor],
) -> Tensor:
    """By operations that torch differentiates. way: `update` or `plain`."""
    y = nn.functional.linear(x, weight, bias)
    out = []
    for x_own, y_own, part in zip(x.split(list(sizes), -2), y.split(list(sizes), -2), parts, strict=True):
        out.append(y_own if part is None else way(x_own, y_own, *part))
    return torch.cat(out, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), (B * scale).to(x.dtype)
        low = flat @ a.T
        if bias is None:
            y = flat @ weight.T
        else:
            y = torch.addmm(bias, flat, weight.T)
        ctx.save_for_backward(x, weight, bias, A, B, low)
        ctx.scale = scale
        return y.addmm_(low, b.T).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, low = ctx.saved_tensors
        if torch.is_grad_enabled():
            d_x, d_A, d_B = differentiable_grads(
                lambda x, A, B: plain(x, nn.functional.linear(x, weight, bias), A, B, ctx.scale),
                (x, A, B),
                grads[0],
            )
            return d_x, None, None, d_A, d_B, None
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        a, b = A.to(x.dtype), (B * ctx.scale).to(x.dtype)
        d_x = d_A = d_B = inner = None
        if needs_x or needs_A:
            inner = grad @ b
        if needs_x:
            d_x = (grad @ weight).addmm_(inner, a).view(x.shape)
        if inner is not None and needs_A:
            d_A = (inner.T @ flat).to(A.dtype)
        if needs_B:
            d_B = (low.T @ grad).T.to(B.dtype, memory_format=torch.contiguous_format).mul_(ctx.scale)
        return d_x, None, None, d_A, d_B, None


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
        needs_x, needs_y, needs_A, needs_B, _ = ctx.needs_input_grad
        d_x = d_A = d_B = inner = None
        d_y = grads[0] if needs_y else None
        if torch.is_grad_enabled():
            zeros = torch.zeros_like(grads[0])  # in the place of y: the update alone is differentiated
            d_x, d_A, d_B = differentiable_grads(
                lambda x, A, B: plain(x, zeros, A, B, ctx.scale), (x, A, B), grads[0]
            )
            return d_x, d_y, d_A, d_B, None
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        if needs_x or needs_A:
            inner = grad @ (B * ctx.scale).to(x.dtype)
        if inner is not None and needs_x:
            d_x = (inner @ A.to(x.dtype)).view(x.shape)
        if inner is not None and needs_A:
            d_A = (inner.T @ flat).to(A.dtype)
        if needs_B:
            d_B = (low.T @ grad).T.to(B.dtype, memory_format=torch.contiguous_format).mul_(ctx.scale)
        return d_x, d_y, d_A, d_B, None


# ------------------------------------------------------------ on a GPU


class _OnDevice(torch.autograd.Function):
    """`_Linear`, or `_Update` where y is there already, in as few launches as there are products. The scale
    is in the factors' copies, and gradients of factors are products into fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, scaled_a = CASTS.of(A, scale, x.dtype)
        b, scaled_b = CASTS.of(B, scale, x.dtype)
        low = CASTS.low(x, A, scaled_a)
        if weight is not None:
            out = nn.functional.linear(flat, weight, bias).addmm_(low, b.T)
        else:
            assert y is not None
            out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T)
        ctx.save_for_backward(x, weight, bias, A, B, low, a, scaled_b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], len(B))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, low, a, scaled_b = ctx.saved_tensors
        needs_x, needs_y, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        d_y = grads[0] if needs_y else None
        if torch.is_grad_enabled():
            d_x, d_A, d_B = differentiable_grads(
                lambda x, A, B: plain(x, _base(x, weight, bias, grads[0]), A, B, ctx.scale),
                (x, A, B),
                grads[0],
            )
            return d_x, d_y, None, None, d_A, d_B, None
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        d_x = d_A = d_B = inner = None
        if needs_x or needs_A:
            inner = grad @ scaled_b
        if inner is not None and needs_x:
            d_x = inner @ a if weight is None else (grad @ weight).addmm_(inner, a)
            d_x = d_x.view(x.shape)
        if inner is not None and needs_A:
            d_A = wide_product(inner.T, flat, A.dtype)
        if needs_B:
            d_B = wide_product(grad.T, low, B.dtype)
        return d_x, d_y, None, None, d_A, d_B, None


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """What the update is added to; zeros where that is not differentiated here."""
    if weight is None:
        return torch.zeros_like(like)
    return nn.functional.linear(x, weight, bias)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, k], [k, n] -> [m, n] in a wider precision, without one that is rounded in between."""
    if a.dtype == dtype:
        return a @ b
    if _writes_wide(a.device, a.dtype, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


@cache
def _writes_wide(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Has this torch products of `dtype` into `wide` on this device?"""
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return bool((torch.mm(x, x, out_dtype=wide) == 16).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


@dataclass
class _Reading:
    """Who reads a tensor, one after the other."""

    x: ReferenceType[Tensor]
    version: int
    factors: list[int] = field(default_factory=list)  # ids of those that have read it
    low: dict[int, Tensor] = field(default_factory=dict)  # id of a factor -> x times it, computed ahead


class Casts(threading.local):
    """LoRA's factors in the network's precision, by themselves and times their scale. Within `once` each is
    cast once, together with all that were read there before; and those that read the same tensor one after
    the other (queries, keys and values) lie side by side, and are multiplied with it at once.

    Each thread has its own: a run in another may end its batch at any moment.
    """

    def __init__(self) -> None:
        self.open = 0  # how many contexts of `once`
        # id of a factor -> itself, its scale
        self.factors: dict[int, tuple[ReferenceType[Tensor], float]] = {}
        self.ready: dict[int, tuple[tuple, Tensor, Tensor]] = {}
        self.beside: dict[int, list[int]] = {}  # id of a factor -> of those that read the same, itself first
        self.stacks: dict[int, Tensor] = {}  # the same -> they, times their scale
        self.reading: _Reading | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """For as long as nobody writes into the factors: forward and backward of a batch."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self._end_reading()
            self.ready.clear()
            self.stacks.clear()

    def of(self, factor: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A factor in this precision, and the same times the scale."""
        if not self.open:
            cast = factor.to(dtype)
            return cast, cast * scale
        entry = self.ready.get(id(factor))
        if entry is None or entry[0] != _mark(factor, scale, dtype):
            self.factors[id(factor)] = ref(factor), scale
            self._cast_all(factor.device, dtype)
            entry = self.ready[id(factor)]
        return entry[1], entry[2]

    def low(self, x: Tensor, A: Tensor, scaled: Tensor) -> Tensor:
        """x [..., in] as [n, in] times what `of` says of A [r, in]: [n, r]."""
        flat, reading = x.reshape(-1, x.shape[-1]), self.reading
        if not self.open:
            return flat @ scaled.T
        if reading is None or reading.x() is not x or reading.version != x._version:
            self._end_reading()
            reading = self.reading = _Reading(ref(x), x._version)
            if id(A) in self.stacks:
                ranks = [len(self.ready[key][1]) for key in self.beside[id(A)]]
                parts = (flat @ self.stacks[id(A)].T).split(ranks, 1)
                reading.low.update(zip(self.beside[id(A)], parts, strict=True))
        reading.factors.append(id(A))
        low = reading.low.pop(id(A), None)
        return flat @ scaled.T if low is None else low

    def _end_reading(self) -> None:
        if self.reading is not None:
            factors = list(dict.fromkeys(self.reading.factors))
            if len(factors) > 1:
                self.beside[factors[0]] = factors
            else:
                self.beside.pop(factors[0], None)
        self.reading = None

    def _cast_all(self, device: torch.device, dtype: torch.dtype) -> None:
        stale: dict[int, tuple[Tensor, float]] = {}
        for key, (reference, scale) in list(self.factors.items()):
            factor = reference()
            if factor is None:
                del self.factors[key]
                self.beside.pop(key, None)
            elif factor.device == device and self._stale(factor, scale, dtype):
                stale[key] = factor, scale
        factors = [factor.detach() for factor, _ in stale.values()]
        casts = [torch.empty_like(factor, dtype=dtype) for factor in factors]
        scaled = {key: torch.empty_like(cast) for key, cast in zip(stale, casts, strict=True)}
        scaled |= self._stacked(stale, dtype)
        torch._foreach_copy_(casts, factors)
        torch._foreach_copy_(list(scaled.values()), casts)
        torch._foreach_mul_(list(scaled.values()), [scale for _, scale in stale.values()])
        for (key, (factor, scale)), cast in zip(stale.items(), casts, strict=True):
            self.ready[key] = _mark(factor, scale, dtype), cast, scaled[key]

    def _stacked(self, stale: dict[int, tuple[Tensor, float]], dtype: torch.dtype) -> dict[int, Tensor]:
        """Memory for those of the factors that read the same tensors, side by side."""
        views: dict[int, Tensor] = {}
        for first, keys in self.beside.items():
            if any(key not in stale or key in views for key in keys):
                continue
            factors = [stale[key][0] for key in keys]
            if len({factor.shape[1] for factor in factors}) > 1:
                continue
            ranks = [len(factor) for factor in factors]
            stack = torch.empty(sum(ranks), factors[0].shape[1], dtype=dtype, device=factors[0].device)
            self.stacks[first] = stack
            views |= zip(keys, stack.split(ranks), strict=True)
        return views

    def _stale(self, factor: Tensor, scale: float, dtype: torch.dtype) -> bool:
        entry = self.ready.get(id(factor))
        return entry is None or entry[0] != _mark(factor, scale, dtype)


def _mark(factor: Tensor, scale: float, dtype: torch.dtype) -> tuple:
    """Changes when somebody writes into a factor, or gives it other memory."""
    return factor._version, factor.data_ptr(), scale, dtype


CASTS = Casts()


# ------------------------------------------------------------ several updates


class _BatchedLinear(torch.autograd.Function):
    """factors: A and B of each stretch in turn, None and None where it has no update."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Any, sizes: Any, *factors: Any
    ) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        updated, rows, As, Bs = [], [], [], []  # stretches with an update: number, rows of x, factors
        start = 0
        for i, size in enumerate(sizes):
            A, B = factors[2 * i : 2 * i + 2]
            if A is not None:
                updated.append(i)
                rows.append(slice(start, start + size))
                As.append(A)
                Bs.append(B.T * scales[i])
            start += size
        ctx.updated, ctx.rows, ctx.ranks = updated, rows, [len(A) for A in As]
        ctx.scales, ctx.sizes = scales, sizes
        a = b = None
        low: list[Tensor] = []
        if updated:  # all factors are cast at once, [sum of ranks, in] and [sum of ranks, out]
            a, b = torch.cat(As).to(x.dtype), torch.cat(Bs).to(x.dtype)
            for own, a_own in zip(rows, a.split(ctx.ranks), strict=True):
                low.append(flat[own] @ a_own.T)
            for own, low_own, b_own in zip(rows, low, b.split(ctx.ranks), strict=True):
                out[own].addmm_(low_own, b_own)
        ctx.save_for_backward(x, weight, bias, a, b, *factors, *low)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, *rest = ctx.saved_tensors
        factors, low = rest[: 2 * len(ctx.sizes)], rest[2 * len(ctx.sizes) :]
        if torch.is_grad_enabled():
            return _BatchedLinear._differentiable(ctx, x, weight, bias, factors, grads[0])
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        d_x = grad @ weight if ctx.needs_input_grad[0] else None
        d_factors: list[Tensor | None] = [None] * len(factors)
        if ctx.updated:
            d_a, d_b = torch.empty_like(a), torch.empty_like(b)
            by_stretch = zip(ctx.rows, low, *(t.split(ctx.ranks) for t in (a, b, d_a, d_b)), strict=True)
            for own, low_own, a_own, b_own, d_a_own, d_b_own in by_stretch:
                inner = grad[own] @ b_own.T
                if d_x is not None:
                    d_x[own].addmm_(inner, a_own)
                torch.mm(inner.T, flat[own], out=d_a_own)
                torch.mm(low_own.T, grad[own], out=d_b_own)
            wide = factors[2 * ctx.updated[0]].dtype
            d_As, d_Bs = d_a.to(wide).split(ctx.ranks), d_b.to(wide).split(ctx.ranks)
            for i, d_A, d_B in zip(ctx.updated, d_As, d_Bs, strict=True):
                d_factors[2 * i] = d_A
                d_factors[2 * i + 1] = d_B.T.mul(ctx.scales[i])
        if d_x is not None:
            d_x = d_x.view(x.shape)
        return d_x, None, None, None, None, *d_factors

    @staticmethod
    def _differentiable(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        present = [f for f in factors if f is not None]

        def twin(x: Tensor, *present: Tensor) -> Tensor:
            remaining = iter(present)
            parts: list[Part | None] = []
            for A, scale in zip(factors[::2], ctx.scales, strict=True):
                parts.append(None if A is None else (next(remaining), next(remaining), scale))
            return _stretch_by_stretch(x, weight, bias, parts, ctx.sizes, plain)

        d_x, *d_present = differentiable_grads(twin, (x, *present), grad)
        d_factors: list[Tensor | None] = []
        for factor in factors:
            d_factors.append(None if factor is None else d_present.pop(0))
        return d_x, None, None, None, None, *d_factors


def differentiable_grads(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients that somebody will differentiate: through plain operations, from the inputs alone."""
    # each counts by itself, though one be made of another
    inputs = [x.view_as(x) if x.requires_grad else x for x in inputs]
    moving = [x for x in inputs if x.requires_grad]
    grads = list(torch.autograd.grad(f(*inputs), moving, grad, create_graph=True))
    return [grads.pop(0) if x.requires_grad else None for x in inputs]
