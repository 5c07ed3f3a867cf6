"""Sparse deltas of a weight together with entries of its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.methods.tuners._delta import Delta, frozen
from luthier.methods.tuners.sparse._sparse import Sparse, place_type, some_of
from luthier.registry import family


@family
class Biased(Delta):
    """Family: what it adds to the bias beside the rest."""

    biases: int = 0  # entries of the bias

    def bias_tensors(self, width: int) -> dict[str, Any]:
        if not self.biases:
            return {}
        return {
            "bias_indices": in_order(self.bias_places(width), width),
            "bias_values": torch.zeros(self.biases),
        }

    def bias_places(self, width: int) -> Tensor:
        """[biases] different places in a bias of this length. Random unless a method knows better."""
        return torch.arange(width) if self.biases >= width else some_of(width, self.biases)

    def change(self, p: Any, width: int) -> Any:
        """[width] what is added to the bias; 0 where none of it moves."""
        if not self.biases:
            return 0
        zeros = p.bias_values.new_zeros(width)
        return zeros.index_copy(0, p.bias_indices.long(), p.bias_values)

    def bias(self, b, p):
        return b if b is None or not self.biases else b + self.change(p, len(b))


@family
class Entries(Sparse):
    """Some entries of a weight."""

    n: int | None = None  # of them; not given: by density

    def count(self, W):
        return super().count(W) if self.n is None else self.n


@family
class BiasedEntries(Biased, Entries):
    """Some entries of a weight and of its bias."""

    def init(self, W):
        return super().init(W) | self.bias_tensors(W.shape[0])

    def forward(self, x, y, p, layer):
        return super().forward(x, y, p, layer) + self.change(p, y.shape[-1]).to(y.dtype)


def in_order(places: Tensor, total: int) -> tuple[str, Tensor]:
    """[n] places below total, as a layer keeps them."""
    return frozen(places.sort().values.to(place_type(total)))
