"""Log-probabilities of chosen tokens straight from hidden states: [T, V] never exists, forward or backward.

log p = z[label] - logsumexp(z), z = softcap(scale * (h W' + b)). The backward is the closed form (one-hot minus
softmax), computed on the same chunks. `plain` is the twin that the first batch of every run is compared with.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK_BYTES = 32 * 2**20  # of fp32 logits alive at once


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: a module, and what some families do to its output."""

    module: nn.Module
    scale: float = 1.0  # logits are multiplied by this
    softcap: float = 0.0  # then bounded by cap * tanh(z / cap); 0 = not

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V] logits in fp32."""
        z = self.module(hidden).float()
        z = z * self.scale if self.scale != 1.0 else z
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    @property
    def linear(self) -> bool:
        """Is the module nothing but x W' + b (not wrapped by a tuner, not hooked)?"""
        m = self.module
        return type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations"))


def chunk_size(vocabulary: int) -> int:
    """Tokens whose fp32 logits fit into CHUNK_BYTES."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def plain(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T]: the obvious way."""
    z = head(hidden)
    return z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(-1)


def chunked(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """[T, d], [T] -> [T]: the same numbers in chunks. `head.linear` must hold."""
    return _LinearLogProbs.apply(hidden, head.module.weight, head.module.bias, labels, head.scale, head.softcap)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap):
        size = chunk_size(len(weight))
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        norm = torch.empty_like(out)
        for i in range(0, len(hidden), size):
            z = _logits(hidden[i : i + size], weight, bias, scale, softcap)
            norm[i : i + size] = z.logsumexp(-1)
            out[i : i + size] = z.gather(1, labels[i : i + size, None]).squeeze(1) - norm[i : i + size]
        ctx.save_for_backward(hidden, weight, bias, labels, norm)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, labels, norm = ctx.saved_tensors
        size = chunk_size(len(weight))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wants_bias else None
        for i in range(0, len(hidden), size):
            h, g = hidden[i : i + size], grad[i : i + size, None]
            z = _logits(h, weight, bias, ctx.scale, ctx.softcap)
            slope = 1 - (z / ctx.softcap).square() if ctx.softcap else None
            dz = (z - norm[i : i + size, None]).exp_().mul_(-g)
            dz.scatter_add_(1, labels[i : i + size, None], g)
            dz = dz.mul_(slope) if slope is not None else dz
            dz = (dz.mul_(ctx.scale) if ctx.scale != 1.0 else dz).to(hidden.dtype)
            if wants_hidden:
                torch.mm(dz, weight, out=d_hidden[i : i + size])
            if wants_weight:
                d_weight += dz.T @ h
            if wants_bias:
                d_bias += dz.float().sum(0)
        d_weight = d_weight.to(weight.dtype) if wants_weight else None
        return d_hidden, d_weight, d_bias.to(bias.dtype) if wants_bias else None, None, None, None


def _logits(hidden, weight, bias, scale, softcap):
    z = (hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)).float()
    z = z.mul_(scale) if scale != 1.0 else z
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z
