"""Fastfood: a random map from d numbers to n, regenerated from a seed."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Draws = tuple[Tensor, Tensor, Tensor, Tensor]  # of a map's blocks; see `draws`


class Maps:
    """Random maps that were drawn: the first ones up to `limit` bytes, and the last one, which a backward
    pass takes twice.
    """

    def __init__(self, limit: float):
        self.limit, self.size = limit, 0
        self.cached: dict[Any, Draws] = {}
        self.last: dict[Any, Draws] = {}

    def __deepcopy__(self, memo: Any) -> Maps:
        return self  # a copy of a network has the same maps

    def draws(self, d: int, n: int, seed: int, device: torch.device) -> Draws:
        """As `draws`, which is called where they are not there."""
        key = d, n, seed, device
        if key in self.cached:
            return self.cached[key]
        if key not in self.last:
            self.last = {key: draws(d, n, seed, device)}
            size = sum(t.nbytes for t in self.last[key])
            if self.size + size <= self.limit:
                self.cached |= self.last
                self.size += size
        return self.last[key]


def project(theta: Tensor, n: int, seed: int, maps: Maps | None = None) -> Tensor:
    """[d] -> [n]: Fastfood's random map, |result|^2 = |theta|^2 on average."""
    return _Fastfood.apply(theta, n, seed, maps)


class _Fastfood(torch.autograd.Function):
    """The map and, in the backward pass, its transpose. All blocks at once, in fp32."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, n: int, seed: int, maps: Maps | None) -> Tensor:
        ctx.shape, ctx.n, ctx.dtype = theta.shape, n, theta.dtype
        ctx.draws = partial((maps or Maps(0)).draws, len(theta), n, seed, theta.device)
        G, order, B, norm = ctx.draws()
        padded = torch.zeros_like(G[0])
        padded[: len(theta)] = theta
        # H G Pi H B theta / norm
        mixed = hadamard(padded * B).gather(1, order.long())
        return (hadamard(mixed * G) / norm).flatten()[:n].to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        G, order, B, norm = ctx.draws()
        part = torch.zeros_like(G)
        part.view(-1)[: ctx.n] = grads[0]
        back = hadamard(part) * G / norm  # (H G Pi H B)' = B H Pi' G H
        placed = torch.empty_like(back).scatter_(1, order.long(), back)
        gradient = (hadamard(placed) * B).sum(0)[: ctx.shape[0]]
        return gradient.to(ctx.dtype), None, None, None


def draws(d: int, n: int, seed: int, device: torch.device) -> Draws:
    """Blocks of the map until n numbers are there, [blocks, size] each: G, permutations, signs; [blocks, 1]
    norms that keep lengths.
    """
    size = 1 << (max(d, 1) - 1).bit_length()
    rng = torch.Generator().manual_seed(seed)
    count = -(-n // size)
    G = torch.empty(count, size)
    order = torch.empty(count, size, dtype=torch.int32)
    B = torch.empty(count, size, dtype=torch.int8)
    for block in range(count):
        torch.randn(size, generator=rng, out=G[block])
        order[block] = torch.randperm(size, generator=rng)
        B[block] = torch.randint(0, 2, (size,), generator=rng)
    B.mul_(2).sub_(1)
    norm = G.square().mean(1, keepdim=True).sqrt() * (size * n) ** 0.5
    return G.to(device), order.to(device), B.to(device), norm.to(device)


def hadamard(x: Tensor) -> Tensor:
    """[..., 2^k] -> H x of each block, H of ones and minus ones (Sylvester's). It is the Kronecker product of
    smaller ones: each mixes the last digit of a number's place, which then becomes the first.
    """
    shape, size = x.shape, x.shape[-1]
    for f in factors(size):
        mixed = x.reshape(-1, f) @ sylvester(f).to(x)
        x = mixed.view(-1, size // f, f).transpose(1, 2).reshape(-1, size)
    return x.reshape(shape)


def factors(size: int) -> list[int]:
    """Powers of two, at most 32 each, whose product is `size`."""
    return [32] * ((size.bit_length() - 1) // 5) + [1 << ((size.bit_length() - 1) % 5)]


@cache
def sylvester(n: int) -> Tensor:
    """[n, n] Hadamard's matrix, n a power of two."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H
