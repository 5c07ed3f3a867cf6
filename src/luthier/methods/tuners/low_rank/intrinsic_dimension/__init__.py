"""Intrinsic dimension: trains only d parameters, which a fixed random map turns into a change of all chosen
weights.

W_i' = W_i + lambda_i P_i(theta), with one learned lambda per module (structure-aware, SAID: they count as
part of d) or none (DID). P_i is Fastfood: blocks of H G Pi H B with Hadamard matrices H, signs B, a
permutation Pi and Gaussians G, regenerated from `seed` and the module's name whenever needed, so nothing of
the model's size is stored. The d at which 90 % of full fine-tuning's metric is reached (d90) is the task's
intrinsic dimension: plan `intrinsic_dimension` searches for it.

Departs: the map is drawn for each module, and scaled so that |P_i(theta)|^2 = |theta|^2 times the module's
share of all parameters on average; a Hadamard block longer than a module is cut off. With theta at zero,
lambda gets no gradient at the first step; it starts at one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.clock import Clock
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta
from luthier.registry import INTERNAL, tuner


@tuner(
    paper="arXiv:2012.13255",
    row="intrinsic-dimension",
    provides=[DISABLE_ADAPTER, MERGE],
    former_settings={"said": "structure_aware"},
    use_when="you ask how many free parameters a task really takes; plan `intrinsic_dimension`"
    " searches that number.",
    costs="`d` trainable numbers, but random maps are drawn again at every forward pass: slower than LoRA.",
    starting_rate="far above other tuners': plan `intrinsic_dimension` tries 0.03, 0.1 and 0.3.",
    default_rate=3e-2,
    covers="Fastfood as its dense matrix, lengths kept on average, d numbers with or without scales; "
    "nothing of the network's size is kept.",
    omits="one projection over all weights at once (DID is drawn module by module); embeddings and norms.",
    tests=[
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_fastfood_is_its_dense_matrix",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_intrinsic_dimension_moves_d_numbers",
        "methods/tuners/low_rank/test_intrinsic_dimension.py::test_nothing_of_the_size_of_the_network_is_kept_for_the_backward_pass",
    ],
)
class IntrinsicDimension(Delta):
    """d trainable parameters for a whole network."""

    d: Annotated[int, Field(ge=1)] = 1000  # trainable parameters, scales of modules included
    structure_aware: bool = True  # a separate scale for each module
    seed: int = 0  # random seed of the map; an adapter is loaded with the seed it was trained with
    # how many modules share the d numbers; filled in when it is attached
    modules: Annotated[int, INTERNAL] = 0
    # how many numbers these modules hold; filled in when it is attached
    numbers: Annotated[int, INTERNAL] = 0
    module: Annotated[str, INTERNAL] = ""  # the module whose map this is; filled in for each

    def at(self, name):
        return replace(self, module=name)

    def attach(self, model):
        from luthier.methods.tuners.low_rank.intrinsic_dimension.tuned import IntrinsicDimensionModel

        return IntrinsicDimensionModel(self, model)

    @property
    def length(self):
        """How many numbers the shared vector has."""
        return self.d - self.modules * self.structure_aware

    def init(self, W):
        scale = {"scale": torch.ones(1)} if self.structure_aware else {}
        return {"theta": torch.zeros(self.length), **scale}

    def delta(self, p, shape):
        """[out, in] what is added."""
        n = shape[0] * shape[1]
        step = (
            project(p.theta, n, Clock(self.seed).derive_seed(self.module, at=0)).view(*shape)
            * (n / (self.numbers or n)) ** 0.5
        )
        return step * p.scale if self.structure_aware else step

    def weight(self, W, p):
        return W + self.delta(p, W.shape).to(W.dtype)

    def forward(self, x, y, p, layer):
        # in backward the change is made anew: kept, it would weigh as much as the network
        return checkpoint(self.added, x, y, p, use_reentrant=False)

    def added(self, x, y, p):
        """The output with what the change adds to it."""
        return y + x @ self.delta(p, (y.shape[-1], x.shape[-1])).T


def project(theta: Tensor, n: int, seed: int) -> Tensor:
    """[d] -> [n]: Fastfood's random map, |result|^2 = |theta|^2 on average."""
    return _Fastfood.apply(theta, n, seed)


class _Fastfood(torch.autograd.Function):
    """The map and, in the backward pass, its transpose; the random parts are regenerated each time. All
    blocks at once.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, n: int, seed: int) -> Tensor:
        ctx.shape, ctx.n, ctx.seed = theta.shape, n, seed
        G, order, B, norm = draws(len(theta), n, seed, theta)
        padded = theta.new_zeros(G.shape[1])
        padded[: len(theta)] = theta
        # H G Pi H B theta / norm
        return (hadamard(hadamard(padded * B).gather(1, order) * G) / norm).flatten()[:n]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        G, order, B, norm = draws(ctx.shape[0], ctx.n, ctx.seed, grads[0])
        part = torch.zeros_like(G)
        part.view(-1)[: ctx.n] = grads[0]
        back = hadamard(part) * G / norm  # (H G Pi H B)' = B H Pi' G H
        return (
            (hadamard(torch.empty_like(back).scatter_(1, order, back)) * B).sum(0)[: ctx.shape[0]],
            None,
            None,
        )


def draws(d: int, n: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of the map until n numbers are there, [blocks, size] each: G, permutations, signs; [blocks, 1]
    norms that keep lengths.
    """
    size = 1 << (max(d, 1) - 1).bit_length()
    rng = torch.Generator().manual_seed(seed)
    blocks = [
        (
            torch.randn(size, generator=rng),
            torch.randperm(size, generator=rng),
            torch.randint(0, 2, (size,), generator=rng),
        )
        for _ in range(-(-n // size))
    ]
    G, order, B = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    norm = G.square().mean(1, keepdim=True).sqrt() * (size * n) ** 0.5
    return G.to(like), order.to(like.device), (B * 2.0 - 1).to(like), norm.to(like)


def hadamard(x: Tensor) -> Tensor:
    """[blocks, 2^k] -> H x of each block, H of ones and minus ones (Sylvester's), in k passes."""
    shape, h = x.shape, 1
    while h < shape[-1]:
        pair = x.reshape(-1, 2, h)
        x, h = torch.stack([pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]], 1), 2 * h
    return x.reshape(shape)
