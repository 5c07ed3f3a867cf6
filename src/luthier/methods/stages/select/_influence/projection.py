"""Random projections to few dimensions that leave inner products as they are, up to chance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

BLOCK = 2**24  # signs that are drawn at once


@dataclass(frozen=True)
class Projection:
    """[G, numbers] -> [G, dim]. `rademacher` multiplies with signs, numbers * dim operations a row; `sparse`
    adds each number with a sign to `SPREAD` of the dimensions (Kane and Nelson, 2014). dim 0: as it is.
    """

    numbers: int
    dim: int
    seed: int
    kind: Literal["rademacher", "sparse"] = "sparse"

    @property
    def width(self) -> int:
        return self.dim or self.numbers

    def __call__(self, vectors: Tensor) -> Tensor:
        if not self.dim:
            return vectors
        if self.kind == "sparse":
            return self._sparse(vectors)
        return self._dense(vectors)

    def _sparse(self, vectors: Tensor) -> Tensor:
        out = vectors.new_zeros(len(vectors), self.dim)
        for place in range(SPREAD):
            places, signs = hashes(self.numbers, self.dim, self.seed, place)
            out.index_add_(1, places.to(vectors.device), vectors * signs.to(vectors))
        return out / SPREAD**0.5

    def _dense(self, vectors: Tensor) -> Tensor:
        out = vectors.new_zeros(len(vectors), self.dim)
        step = max(1, BLOCK // self.dim)
        for number, first in enumerate(range(0, self.numbers, step)):
            rng = torch.Generator().manual_seed(self.seed + number)
            some = vectors[:, first : first + step]
            signs = torch.randint(2, (some.shape[1], self.dim), generator=rng, dtype=torch.int8)
            out += some @ (2 * signs.to(vectors) - 1)
        return out / self.dim**0.5


SPREAD = 4


@lru_cache(maxsize=SPREAD)
def hashes(numbers: int, dim: int, seed: int, place: int) -> tuple[Tensor, Tensor]:
    """[numbers] dimensions and [numbers] signs."""
    rng = torch.Generator().manual_seed(seed + place)
    places = torch.randint(dim, (numbers,), generator=rng)
    signs = 2 * torch.randint(2, (numbers,), generator=rng, dtype=torch.int8) - 1
    return places, signs
