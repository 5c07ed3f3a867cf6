"""APOLLO's step: the gradient itself, scaled as Adam would scale it, where the scale is read from a random
projection of few rows.

A gradient [m, n], turned so that m is the shorter side, becomes R = P G with P [rank, m] of random numbers
N(0, 1 / rank), drawn anew every `update_proj_gap` steps. Adam's moments live in R alone, and what Adam makes
of R says how each column of G is scaled: |adam(R)_j| / |R_j|, or one such number for the whole matrix
(`scale_type: tensor`, APOLLO-Mini with rank 1 and scale 128). An update may not exceed the norm of the one
before by more than a factor of 1.01 (Zhu et al., 2024). Only matrices in layers are treated so; all others,
and matrices no larger than `rank`, go through Adam. P is made of its seed and not stored. Departs: P is drawn
from the group's name and its turn, not from a global seed; moments go on when P changes, as in the authors'
code.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.transforms._base import Transform
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.registry import transform

IN_LAYER = re.compile(r"\.\d+\.")
GROWTH = 1.01  # of the norm of an update, in a step at most


@transform(
    paper="arXiv:2412.05270",
    use_when="you write a chain of your own: it is the step within optimizer `apollo`.",
    costs="2 n `rank` fp32 numbers for a matrix of m x n, n the longer side; no decomposition.",
    starting_rate="that of AdamW on the same weights; with one number a matrix `scale` multiplies it.",
)
class Apollo(Transform):
    """G times |adam(P G)| / |P G|, by column or for all."""

    rescales = True

    rank: Annotated[int, Field(ge=1)] = 256  # rows of the projection
    update_proj_gap: Annotated[int, Field(ge=1)] = 200  # steps between two draws of it
    scale_type: Literal["channel", "tensor"] = "channel"  # a number for each column, or one for the matrix
    scale: Annotated[float, Field(gt=0)] = 1.0  # what updates are multiplied by; APOLLO-Mini takes 128
    adam_beta1: float = 0.9  # decay rate of the mean
    adam_beta2: float = 0.999  # decay rate of the mean square
    adam_epsilon: float = 1e-8  # added to the denominator

    def apply(self, grads, state, group, step):
        plain = Adam(adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2, adam_epsilon=self.adam_epsilon)
        in_layer = IN_LAYER.search(f"{group.name}.") is not None
        updates = {}
        for slot, grad in grads.items():
            projected = in_layer and grad.ndim == 2 and min(grad.shape) > self.rank
            if not projected:
                if slot not in state:
                    state[slot] = plain.init(grad)
                updates[slot] = plain.update(grad, state[slot], group.params[slot], step)
                continue
            wide = grad if grad.shape[0] <= grad.shape[1] else grad.T
            update = self.scaled(wide, state.setdefault(slot, {}), f"{group.name}.{slot}", plain)
            updates[slot] = update if wide is grad else update.T
        return updates

    def scaled(self, G: Tensor, own: dict, name: str, adam: Adam) -> Tensor:
        """[m, n] m <= n -> its update."""
        age = own["age"] = own.get("age", 0) + 1
        R = projection(name, (age - 1) // self.update_proj_gap, self.rank, G) @ G
        if "m" not in own:
            own |= adam.init(R)
        likened = adam.update(R, own, R, age)
        dim = 0 if self.scale_type == "channel" else None
        factor = torch.linalg.vector_norm(likened, dim=dim) / (torch.linalg.vector_norm(R, dim=dim) + 1e-8)
        update = G * factor * self.scale
        norm = float(torch.linalg.vector_norm(update))
        most = GROWTH * own["norm"] if own.get("norm") else norm
        if norm > most:
            update = update * (most / norm)
        own["norm"] = min(norm, most)
        return update


def projection(name: str, turn: int, rank: int, like: Tensor) -> Tensor:
    """[rank, m] of N(0, 1 / rank): the same for a name and a turn, on every machine."""
    digest = hashlib.blake2b(repr((name, turn)).encode(), digest_size=8).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    P = torch.randn(rank, like.shape[0], generator=rng) / rank**0.5
    return P.to(like)
