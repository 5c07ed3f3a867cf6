"""Log-probabilities of chosen tokens straight from hidden states: [T, V] never exists, forward or backward.

log p = z[label] - logsumexp(z), z = softcap(scale * (h W' + b)). The backward is the closed form (one-hot minus
softmax), computed on the same chunks. Where the head itself does not move (LoRA, prompts), the gradient of the hidden
states is made on the way forward, so a chunk's logits are made once and not twice.
`plain` is the twin that the first batch of every run is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from luthier.kernels import differentiated_otherwise

CHUNK_BYTES = 64 * 2**20  # of fp32 logits alive at once: fewer tokens at a time leave matrix units idle


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: a module, and what the network does to its output."""

    module: nn.Module
    scale: float = 1.0  # logits are multiplied by this
    softcap: float = 0.0  # then bounded by cap * tanh(z / cap); 0 = not
    bias: Tensor | None = None  # [V] added to the module's output, before the scale

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V] logits in fp32."""
        z = self.module(hidden).float()
        z = z if self.bias is None else z + self.bias
        z = z * self.scale if self.scale != 1.0 else z
        return _bent(z, self.softcap)

    @property
    def linear(self) -> bool:
        """Is the module nothing but x W' + b (not wrapped by a tuner, not hooked)?"""
        m = self.module
        return type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations"))

    def size(self, hidden: Tensor) -> int:
        """The vocabulary: how many logits a hidden state [..., d] becomes."""
        return getattr(self.module, "out_features", hidden.shape[-1])


def chunk_size(vocabulary: int) -> int:
    """Tokens whose fp32 logits fit into CHUNK_BYTES."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def plain(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T]: the obvious way."""
    z = head(hidden)
    return z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(-1)


def normaliser(z: Tensor, p: Tensor | None = None) -> Tensor:
    """[C, V] -> [C, 1] log-sum-exp in fp32, by one fused softmax p: many times faster than torch.logsumexp on CPUs."""
    if p is None or z.requires_grad:  # where somebody differentiates: one place of the largest, not a mean over equals
        p = z.softmax(-1, dtype=torch.float32) if p is None else p
        most, at = z.max(-1, keepdim=True)  # the largest p is never 0
        return most.float() - p.gather(1, at).log()
    return z.amax(-1, keepdim=True).float() - p.amax(-1, keepdim=True).log()  # without the place: a fourth of the time


def chunked(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T] in fp32: the same numbers in chunks. `head.linear` must hold.

    A second derivative is right too, through the plain way: its first backward makes [T, V].
    """
    if differentiated_otherwise():
        return plain(hidden, head, labels)
    module = cast(nn.Linear, head.module)
    weight, bias = module.weight, module.bias
    if head.bias is not None:
        bias = head.bias.to(weight.dtype) if bias is None else bias + head.bias.to(weight.dtype)
    moves = weight.requires_grad or (bias is not None and bias.requires_grad)
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not moves
    return _LinearLogProbs.apply(hidden, weight, bias, labels, head.scale, head.softcap, ahead)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, ahead):
        size = chunk_size(len(weight))
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ahead else None  # [T, d] -d log p / d hidden
        room = Room(weight, min(size, len(hidden)))
        for i in range(0, len(hidden), size):
            part = slice(i, i + size)
            z = _logits(hidden[part], weight, bias, scale, softcap, room)
            p = room.softmax(z)
            out[part] = (z.gather(1, labels[part, None]).float() - normaliser(z, p)).squeeze(1)
            if ahead:
                torch.mm(room.narrow(_slope(z, p, labels[part], scale, softcap)), weight, out=slope[part])
        ctx.save_for_backward(hidden, weight, bias, labels, slope)
        ctx.settings = scale, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, labels, slope = ctx.saved_tensors
        scale, softcap = ctx.settings
        if torch.is_grad_enabled():  # create_graph: somebody will differentiate this gradient
            tensors = [t for t, wanted in zip((hidden, weight, bias), ctx.needs_input_grad) if wanted]
            z = _bent(nn.functional.linear(hidden, weight, bias).float() * scale, softcap)
            logp = z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(-1)
            found = iter(torch.autograd.grad(logp, tensors, grad, create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), *[None] * 4
        if slope is not None:
            return (slope * -grad[:, None]).to(slope.dtype), *[None] * 6
        size = chunk_size(len(weight))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wants_bias else None
        room = Room(weight, min(size, len(hidden)))
        for i in range(0, len(hidden), size):
            part = slice(i, i + size)
            z = _logits(hidden[part], weight, bias, scale, softcap, room)
            dz = _slope(z, room.softmax(z), labels[part], scale, softcap).mul_(-grad[part, None])
            if d_bias is not None:
                d_bias += dz.sum(0)
            dz = room.narrow(dz)
            if d_hidden is not None:
                torch.mm(dz, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += dz.T @ hidden[part]
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 4


class Room:
    """Memory in which the logits of one chunk after another are worked on: at wide vocabularies, getting it anew for each
    costs a CPU as much time as the softmax."""

    def __init__(self, weight: Tensor, rows: int):
        self.z = weight.new_empty(rows, len(weight))
        self.p = torch.empty(rows, len(weight), dtype=torch.float32, device=weight.device)

    def softmax(self, z: Tensor) -> Tensor:
        """[C, V] probabilities in fp32."""
        p = self.p[: len(z)]
        return torch.softmax(p.copy_(z), -1, out=p)

    def narrow(self, dz: Tensor) -> Tensor:
        """In the weight's precision; written over the logits, which nobody needs any more."""
        return dz if dz.dtype == self.z.dtype else self.z[: len(dz)].copy_(dz)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, room: Room) -> Tensor:
    z = room.z[: len(hidden)]
    z = torch.mm(hidden, weight.T, out=z) if bias is None else torch.addmm(bias, hidden, weight.T, out=z)
    z = z.float().mul_(scale) if scale != 1.0 else z
    return z.float().div_(softcap).tanh_().mul_(softcap) if softcap else z


def _bent(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap) if softcap else z


def _slope(z: Tensor, p: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """-d log p / d (h W' + b), [C, V] in fp32, written over the probabilities p: with p near 1, 1 - p must not be rounded."""
    p.scatter_add_(1, labels[:, None], torch.full_like(p[:, :1], -1.0))
    p = p.mul_(1 - (z / softcap).square()) if softcap else p
    return p.mul_(scale) if scale != 1.0 else p
