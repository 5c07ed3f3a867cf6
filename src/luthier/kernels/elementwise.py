"""What a network does between its matrix products, in fewer passes over memory: RMSNorm, rotary positions,
GELU, dropout.

Composed of torch operations, each of these writes and keeps several tensors as large as its input, some of
them in fp32. Here each is one autograd function with a closed-form backward that keeps only its inputs (a
norm: x and one number a row), worked through in stretches that stay in the cache; nothing is compiled.
Modules of any transformers network are recognised by what they hold, and replaced only where the fast form
answers as the module does on random numbers; the first batch of every run is compared besides
(train/checks.py), and `_switch.plainly` is the network's own code for a while. Dropout on a CPU takes 16
random bits for each number, so a share is met to 1/65,536; torch's own draws there took five times as long.

SwiGLU is left as it is: keeping less by computing silu again in backward was measured, and cost a CPU more
than it saved.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier import compat
from luthier.compat.transformers import add_entry
from luthier.kernels._switch import always, use_fast
from luthier.kernels.lora import differentiable_grads
from luthier.kernels.tolerance import rounding

STRETCH = 2**19  # numbers worked on at once on a CPU: in fp32 about what its cache holds
GELU = "NewGELUActivation"  # transformers' name for the one with tanh, of eight operations
ORIGINAL = "luthier_original"  # attribute of a fast form: what it stands in for
ROTARY = "apply_rotary_pos_emb"  # as transformers' modelling files call it


def stretches(x: Tensor) -> Iterator[slice]:
    """Rows of x [T, d] that are worked on together."""
    rows = max(1, len(x))
    if x.device.type == "cpu":
        rows = max(1, STRETCH // max(1, x.shape[1]))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)


# ------------------------------------------------------------ RMSNorm


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
        buffer = None
        for s in stretches(flat):
            part = flat[s]
            if buffer is None:
                buffer = torch.empty(part.shape, device=x.device)
            wide = buffer[: len(part)].copy_(part)
            r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
            r = r.div_(x.shape[-1]).add_(eps).rsqrt_()
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
            twice = differentiable_grads(lambda x, w: plain_norm(x, w, ctx.eps), (x, weight), grads[0])
            return *twice, None
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        d_x = d_weight = buffer = None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(flat)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, device=x.device)
        wide_weight = weight.float()
        for s in stretches(flat):
            part, r = flat[s], rate[s]
            if buffer is None:
                buffer = torch.empty(3, *part.shape, device=x.device)
            g, normed, spare = buffer[:, : len(part)]
            g.copy_(grad[s])
            torch.mul(part, r, out=normed)
            if d_weight is not None:
                d_weight += torch.mul(g, normed, out=spare).sum(0)
            if d_x is not None:  # r * (g w - normed * mean(g w normed))
                g.mul_(wide_weight)
                along = torch.mul(g, normed, out=spare).sum(-1, keepdim=True).div_(-x.shape[-1])
                d_x[s] = g.addcmul_(normed, along).mul_(r)
        if d_x is not None:
            d_x = d_x.view(x.shape)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_x, d_weight, None


# ------------------------------------------------------------ rotary positions


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin: x cos + (-x2, x1) sin, x1 and x2 the halves of x [..., d]."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without a rotated copy of x; cos and sin have no gradient."""
    return _Rotary.apply(x, cos, sin)


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the rotation does to gradients: the rotation back."""
    half = grad.shape[-1] // 2
    out = grad * cos
    out[..., :half].addcmul_(grad[..., half:], sin[..., half:], value=1)
    out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=1)
        ctx.save_for_backward(cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _RotaryBack.apply(grads[0], cos, sin), None, None
        return _rotated_back(grads[0], cos, sin), None, None


class _RotaryBack(torch.autograd.Function):
    """The rotation back, and forth again: as often as somebody differentiates."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated_back(grad, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotary(grads[0], cos, sin), None, None


# ------------------------------------------------------------ dropout


def dropout(x: Tensor, p: float) -> Tensor:
    """x with numbers left out at random, a share p of them, and the others the larger for it."""
    if x.device.type != "cpu" or not 0 < p < 0.99 or not use_fast(x):
        return F.dropout(x, p)
    return x * dropout_mask(x, p) * (1 / (1 - p))


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """1 where a number of x is not left out, else 0."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p)
    count = x.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    sixteen_bits = drawn.view(torch.int16)[:count]
    limit = min(round(p * 2**16), 2**16 - 1) - 2**15
    return sixteen_bits.ge_(limit).to(x.dtype).view(x.shape)


# ------------------------------------------------------------ in a network


def _rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    return rotary(q, cos, sin), rotary(k, cos, sin)


@dataclass(frozen=True)
class FastForms:
    """What takes the place of the network's own code."""

    norm: Callable[[Tensor, Tensor, float], Tensor]  # (x, weight, eps)
    # (q, k, cos, sin, dimension of heads)
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class _FusedNorm(torch.autograd.Function):
    """By the kernels that torch has on CUDA: one forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rate = torch.ops.aten._fused_rms_norm(x, [len(weight)], weight, eps)
        ctx.save_for_backward(x, weight, rate)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        if torch.is_grad_enabled():
            twice = differentiable_grads(lambda x, w: plain_norm(x, w, ctx.eps), (x, weight), grads[0])
            return *twice, None
        needed = list(ctx.needs_input_grad[:2])
        grad = grads[0].contiguous()
        d_x, d_weight = torch.ops.aten._fused_rms_norm_backward(
            grad, x.contiguous(), [len(weight)], rate, weight, needed
        )
        return d_x if needed[0] else None, d_weight if needed[1] else None, None


def _fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _FusedNorm.apply(x, weight, eps)


def _joint_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys [R, H, W, d] side by side, as [R, W, H + K, d], in which attention reads them."""
    if heads != 1:
        return _rotary_pair(q, k, cos, sin, heads)
    both = torch.cat((q.transpose(1, 2), k.transpose(1, 2)), 2)
    turned = rotary(both, cos.unsqueeze(2), sin.unsqueeze(2))
    turned_q, turned_k = turned.split([q.shape[1], k.shape[1]], 2)
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


OWN = FastForms(lambda x, weight, eps: rms_norm(x, weight, eps), _rotary_pair)
# a launch costs more than memory on a GPU, and torch has a kernel for norms there
ON_CUDA = FastForms(_fused_norm, _joint_rotary)


def install(model: nn.Module, forms: FastForms = OWN) -> dict[str, int]:
    """Give a network the fast forms where they answer as its own; how many modules of each kind took them.

    Rotary positions are a function of transformers' modelling file: other networks of that file get the fast
    form as well, until `uninstall`.
    """
    replaced: dict[str, int] = {}
    agrees: dict[Any, bool] = {}  # class and precision -> does the fast form answer as the module?
    first = next(model.parameters())
    with torch.no_grad():
        for module in model.modules():
            kind: Any = type(module)
            if hasattr(kind, ORIGINAL) or "forward" in vars(module):
                continue
            if kind.__name__ == GELU:
                fast, like = _fast_gelu(kind), first.flatten()[:64]
            elif _is_norm(module):
                fast, like = _fast_norm(kind, forms), cast(Tensor, module.weight)
            else:
                continue
            key = (kind, like.dtype)
            if key not in agrees:
                agrees[key] = _agrees(module, fast, like)
            if agrees[key]:
                module.__class__ = fast
                replaced[kind.__name__] = replaced.get(kind.__name__, 0) + 1
        for source in {type(m).__module__ for m in model.modules()}:
            if _install_rotary(sys.modules.get(source), forms, first.device):
                replaced[ROTARY] = 1
    return replaced


def install_dropout(model: nn.Module) -> None:
    """Where it is a module of its own, a tuner's too."""
    for module in model.modules():
        if type(module) is nn.Dropout and "forward" not in vars(module):
            module.__class__ = _FAST_DROPOUT


def is_installed(model: nn.Module) -> bool:
    """Has a network any of the fast forms? Dropout aside, whose draws cannot be compared."""
    for kind in {type(m) for m in model.modules()} - {_FAST_DROPOUT}:
        function = getattr(sys.modules[kind.__module__], ROTARY, None)
        if hasattr(kind, ORIGINAL) or hasattr(function, ORIGINAL):
            return True
    return False


def uninstall(model: nn.Module) -> None:
    """Give a network its own code back."""
    for module in model.modules():
        module.__class__ = getattr(type(module), ORIGINAL, type(module))
        source = sys.modules.get(type(module).__module__)
        original = getattr(getattr(source, ROTARY, None), ORIGINAL, None)
        if original is not None:
            setattr(source, ROTARY, original)


def _agrees(module: nn.Module, fast: type, like: Tensor) -> bool:
    """Does a module with the fast forward answer as it does by itself? like: a tensor of the precision and
    width of what it reads.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(like), generator=rng).to(like) * 3
    expected, kind = module(x), type(module)
    try:
        module.__class__ = fast
        with always():
            out = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        module.__class__ = kind
    return out.dtype == expected.dtype and _close(out, expected)


def _close(a: Tensor, b: Tensor) -> bool:
    limit = rounding(b.dtype)
    return torch.allclose(a.float(), b.float(), rtol=limit, atol=limit)


def _subclass(kind: type, forward: Callable) -> type:
    """kind with another forward; by name still itself, for whoever looks modules up by name."""
    fast = type(kind.__name__, (kind,), {"forward": forward, ORIGINAL: kind})
    fast.__module__ = kind.__module__
    fast.__qualname__ = kind.__qualname__
    return fast


def _eps(module: Any) -> float | None:
    """The epsilon of a norm, by either of its two names; None where it is no plain number."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
        if value is not None:
            return None
    return None


def _is_norm(module: Any) -> bool:
    """Named so, with one weight and an epsilon and nothing else."""
    name = type(module).__name__
    if "RMSNorm" not in name and not name.endswith("LayerNorm"):
        return False
    if [n for n, _ in module.named_parameters()] != ["weight"] or [*module.buffers()]:
        return False
    return _eps(module) is not None and module.weight.ndim == 1 and not module.weight.is_meta


@cache
def _fast_norm(kind: Any, forms: FastForms) -> type:
    def forward(self: Any, x: Tensor, *more: Any, **named: Any) -> Tensor:
        weight = self.weight
        if more or named or x.dtype != weight.dtype or not use_fast(x):
            return kind.forward(self, x, *more, **named)
        return forms.norm(x, weight, cast(float, _eps(self)))

    return _subclass(kind, forward)


@cache
def _fast_gelu(kind: Any) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        if use_fast(x):
            return F.gelu(x, approximate="tanh")
        return kind.forward(self, x)

    return _subclass(kind, forward)


def _dropout_forward(self: Any, x: Tensor) -> Tensor:
    if self.training and not self.inplace:
        return dropout(x, self.p)
    return nn.Dropout.forward(self, x)


_FAST_DROPOUT = _subclass(nn.Dropout, _dropout_forward)


def _install_rotary(source: Any, forms: FastForms, device: torch.device) -> bool:
    """Let a modelling file rotate queries and keys the fast way, where its own is the plain rotation of
    halves.
    """
    own: Any = getattr(source, ROTARY, None)
    if own is None or hasattr(own, ORIGINAL) or not compat.active():
        return False
    if [*inspect.signature(own).parameters] != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = q.dtype == k.dtype == cos.dtype and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if not alike or cos.requires_grad or not use_fast(q):
            return own(q, k, cos, sin, unsqueeze_dim)
        return forms.rotary(q, k, cos, sin, unsqueeze_dim)

    rng = torch.Generator().manual_seed(0)
    inputs = []
    for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)):  # q, k, cos, sin
        inputs.append(torch.randn(shape, generator=rng).to(device))
    try:
        expected = own(*inputs)
        with always():
            out = fast(*inputs)
    except (TypeError, ValueError, RuntimeError):
        return False
    if not all(map(_close, out, expected)):
        return False
    setattr(fast, ORIGINAL, own)
    add_entry(vars(source), ROTARY, fast, replace=True)
    return True
