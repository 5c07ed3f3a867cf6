"""What a network does between its matrix products, in fewer passes over memory: RMSNorm, rotary positions,
GELU, dropout.

Composed of torch operations, each of these writes and keeps several tensors as large as its input, some of
them in fp32. Here each is one autograd function with a closed-form backward that keeps only its inputs (a
norm: x and one number a row), worked through in stretches that stay in the cache; nothing is compiled.
Modules of any transformers network are found by what they hold, and taken only where the fast form answers as
the module does on random numbers; the first batch of every run is compared besides (train/checks.py), and `plainly`
is the network's own code for a while. Dropout on a CPU takes 16 random bits for each number, so a share is
met to 1/65,536; torch's own draws there took five times as long.

SwiGLU is left as it is: keeping less by computing silu again in backward was tried, and cost a CPU more than
it saved.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier import compat
from luthier.compat.transformers import replace_function
from luthier.kernels import differentiated_otherwise
from luthier.kernels.compiled import uncompiled
from luthier.kernels.lora import again

STRETCH = 2**19  # numbers worked on at once on a CPU: in fp32 about what its cache holds
# numbers up to which the network's own code is taken: a token being written, where calls cost more than
# memory
SMALL = 2**15
_plain = 0  # how many ask for the network's own code just now
_least = SMALL


@contextmanager
def plainly() -> Iterator[None]:
    """The network's own code, for a while."""
    global _plain
    _plain += 1
    try:
        with uncompiled():
            yield
    finally:
        _plain -= 1


@contextmanager
def always() -> Iterator[None]:
    """However small the tensors are, for a while: to try the fast forms out."""
    global _least
    was, _least = _least, 0
    try:
        yield
    finally:
        _least = was


def own_way(x: Tensor) -> bool:
    """Are the fast forms wanted for x, and can they be?"""
    return not _plain and x.numel() >= _least and not differentiated_otherwise()


def stretches(x: Tensor) -> Iterator[slice]:
    """Rows of x [T, d] that are worked on together."""
    rows = max(1, STRETCH // max(1, x.shape[1])) if x.device.type == "cpu" else len(x)
    for i in range(0, len(x), max(1, rows)):
        yield slice(i, i + rows)


# ---------------------------------------------------------------------------------------------- RMSNorm


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin, and what transformers computes."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., d], [d] -> [..., d]: statistics in fp32, rounded where transformers rounds."""
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, rate = torch.empty_like(flat), torch.empty(len(flat), 1, device=x.device)
        wide = None
        for s in stretches(flat):
            part = flat[s]
            wide = torch.empty(part.shape, device=x.device) if wide is None else wide[: len(part)]
            wide.copy_(part)
            r = (
                torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
                .square_()
                .div_(x.shape[-1])
                .add_(eps)
                .rsqrt_()
            )
            rate[s] = r
            out[s] = wide.mul_(r)
            out[s].mul_(weight)
        ctx.save_for_backward(x, weight, rate)
        ctx.eps = eps
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(lambda x, w: plain_norm(x, w, ctx.eps), (x, weight), grads[0]), None
        wants_x, wants_weight, _ = ctx.needs_input_grad
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        d_x = torch.empty_like(flat) if wants_x else None
        d_weight = torch.zeros(weight.shape, device=x.device) if wants_weight else None
        wide_weight, room = weight.float(), None
        for s in stretches(flat):
            part, r = flat[s], rate[s]
            room = torch.empty(3, *part.shape, device=x.device) if room is None else room[:, : len(part)]
            g, normed, spare = room
            g.copy_(grad[s])
            torch.mul(part, r, out=normed)
            if d_weight is not None:
                d_weight += torch.mul(g, normed, out=spare).sum(0)
            if d_x is not None:  # r * (g w - normed * mean(g w normed))
                g.mul_(wide_weight)
                along = torch.mul(g, normed, out=spare).sum(-1, keepdim=True).div_(-x.shape[-1])
                d_x[s] = g.addcmul_(normed, along).mul_(r)
        return (
            None if d_x is None else d_x.view(x.shape),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
        )


# ---------------------------------------------------------------------------------------------- rotary positions


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin: x cos + (-x2, x1) sin, x1 and x2 the halves of x [..., d]."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without a turned copy of x; cos and sin do not move."""
    return _Rotary.apply(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """x turned; way -1: what it does to gradients, the turn back."""
    half = x.shape[-1] // 2
    out = x * cos
    first, second = (sin[..., :half], sin[..., half:]) if way > 0 else (sin[..., half:], sin[..., :half])
    out[..., :half].addcmul_(x[..., half:], first, value=-way)
    out[..., half:].addcmul_(x[..., :half], second, value=way)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotary._back(grads[0], *ctx.saved_tensors), None, None

    @staticmethod
    def _back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _Back.apply(grad, cos, sin) if torch.is_grad_enabled() else _turned(grad, cos, sin, -1)


class _Back(torch.autograd.Function):
    """The turn back, and back again: as often as somebody differentiates."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(grad, cos, sin, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return rotary(grads[0], *ctx.saved_tensors), None, None


# ---------------------------------------------------------------------------------------------- dropout


def dropout(x: Tensor, p: float) -> Tensor:
    """x with numbers left out at random, a share p of them, and the others the larger for it."""
    if x.device.type != "cpu" or not 0 < p < 0.99 or not own_way(x):
        return F.dropout(x, p)
    return x * stays(x, p) * (1 / (1 - p))


def stays(x: Tensor, p: float) -> Tensor:
    """1 where a number of x is not left out, else 0."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p)
    drawn = (
        torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        .random_(-(2**63), None)
        .view(torch.int16)[: x.numel()]
    )
    return drawn.ge_(min(round(p * 2**16), 2**16 - 1) - 2**15).to(x.dtype).view(x.shape)


# ---------------------------------------------------------------------------------------------- in a network


@dataclass(frozen=True)
class Forms:
    """What takes the place of the network's own code."""

    norm: Callable[[Tensor, Tensor, float], Tensor]  # (x, weight, eps)
    # (q, k, cos, sin, the place of heads)
    turn: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


OWN = Forms(lambda x, weight, eps: rms_norm(x, weight, eps), _turn)


def take(model: nn.Module, forms: Forms = OWN) -> dict[str, int]:
    """Give a network the fast forms where they answer as its own; how many modules of each kind took them."""
    found: dict[str, int] = {}
    tried: dict[Any, bool] = {}
    with torch.no_grad():
        for module in model.modules():
            kind, gelu = type(module), type(module).__name__ == GELU
            if not (gelu or _is_norm(module)) or hasattr(kind, "as_it_was") or "forward" in vars(module):
                continue
            like = cast(Tensor, next(model.parameters()) if gelu else module.weight)
            fast = _fast_gelu(kind) if gelu else _fast_norm(kind, forms)
            key = (kind, like.dtype)
            if key not in tried:
                tried[key] = _agree(module, fast, _probe(like.flatten()[:64] if gelu else like))
            if tried[key]:
                module.__class__ = fast
                found[kind.__name__] = found.get(kind.__name__, 0) + 1
        for source in {type(m).__module__ for m in model.modules()}:
            if turned := _take_rotary(sys.modules.get(source), forms, next(model.parameters()).device):
                found[turned] = 1
    return found


def take_dropout(model: nn.Module) -> None:
    """Where it is a module of its own, a tuner's too."""
    for module in model.modules():
        if type(module) is nn.Dropout and "forward" not in vars(module):
            module.__class__ = _FAST_DROPOUT


def taken(model: nn.Module) -> bool:
    """Has a network any of the fast forms? Dropout aside, which nobody can compare."""
    kinds = {type(m) for m in model.modules()} - {_FAST_DROPOUT}
    return any(
        hasattr(k, "as_it_was") or hasattr(getattr(sys.modules[k.__module__], ROTARY, None), "as_it_was")
        for k in kinds
    )


def leave(model: nn.Module) -> None:
    """Give a network its own code back."""
    for module in model.modules():
        module.__class__ = getattr(type(module), "as_it_was", type(module))
        home = sys.modules.get(type(module).__module__)
        if own := getattr(getattr(home, ROTARY, None), "as_it_was", None):
            setattr(home, ROTARY, own)


def _agree(module: nn.Module, fast: type, x: Tensor) -> bool:
    want, was = module(x), type(module)
    try:
        module.__class__ = fast
        with always():
            got = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        module.__class__ = was
    return got.dtype == want.dtype and torch.allclose(
        got.float(), want.float(), rtol=close(want.dtype), atol=close(want.dtype)
    )


def close(dtype: torch.dtype) -> float:
    """How far two right ways of rounding lie apart."""
    return 1e-5 if dtype == torch.float32 else 2**-6


def _dressed(kind: type, forward: Callable) -> type:
    """kind with another forward; by name still itself, for whoever looks modules up by name."""
    made = type(kind.__name__, (kind,), {"forward": forward, "as_it_was": kind})
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
    return made


def _eps(module: Any) -> float | None:
    found = next(
        (e for n in ("variance_epsilon", "eps") if (e := getattr(module, n, None)) is not None), None
    )
    return found if isinstance(found, float) else None


def _is_norm(module: Any) -> bool:
    """Named so, with one weight and an epsilon and nothing else."""
    named = "RMSNorm" in type(module).__name__ or type(module).__name__.endswith("LayerNorm")
    if (
        not named
        or [n for n, _ in module.named_parameters()] != ["weight"]
        or [*module.buffers()]
        or _eps(module) is None
    ):
        return False
    return module.weight.ndim == 1 and not module.weight.is_meta


@cache
def _fast_norm(kind: Any, forms: Forms) -> type:
    def forward(self: Any, x: Tensor, *more: Any, **named: Any) -> Tensor:
        weight = self.weight
        if more or named or x.dtype != weight.dtype or not own_way(x):
            return kind.forward(self, x, *more, **named)
        return forms.norm(x, weight, cast(float, _eps(self)))

    return _dressed(kind, forward)


GELU = "NewGELUActivation"  # transformers' name for the one with tanh, of eight operations


@cache
def _fast_gelu(kind: Any) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if own_way(x) else kind.forward(self, x)

    return _dressed(kind, forward)


def _drop(self: Any, x: Tensor) -> Tensor:
    return dropout(x, self.p) if self.training and not self.inplace else nn.Dropout.forward(self, x)


_FAST_DROPOUT = _dressed(nn.Dropout, _drop)


def _probe(weight: Tensor) -> Tensor:
    return torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) * 3


ROTARY = "apply_rotary_pos_emb"  # as transformers' modelling files call it


def _take_rotary(source: Any, forms: Forms, device: torch.device) -> str | None:
    """Let a modelling file turn queries and keys the fast way, where that is the plain turn of halves."""
    own: Any = getattr(source, ROTARY, None)
    if own is None or hasattr(own, "as_it_was") or not compat.active():
        return None
    if [*inspect.signature(own).parameters] != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return None

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = (
            q.dtype == k.dtype == cos.dtype
            and q.shape[-1] == k.shape[-1] == cos.shape[-1]
            and not cos.requires_grad
        )
        if not alike or not own_way(q):
            return own(q, k, cos, sin, unsqueeze_dim)
        return forms.turn(q, k, cos, sin, unsqueeze_dim)

    rng = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(s, generator=rng).to(device) for s in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    try:
        want = own(q, k, cos, sin)
        with always():
            got = fast(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not all(
        torch.allclose(a, b, rtol=close(q.dtype), atol=close(q.dtype)) for a, b in zip(want, got, strict=True)
    ):
        return None
    fast.as_it_was = own  # type: ignore[attr-defined]
    replace_function(source, ROTARY, fast)
    return ROTARY
