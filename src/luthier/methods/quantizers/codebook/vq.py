"""VQ: vector quantization. Each few weights in a row are coded as one of 2**bits learned vectors of their
layer, fitted by k-means.

One code book of AQLM (arXiv:2401.06118), with one scale per output. Departs from it in how the code book is
fitted: by k-means on the weights alone, not on the layer's outputs, with initial centroids spread by norm, so
nothing is random.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.quantizers._base import QUANTIZED_WEIGHTS, Quantizer
from luthier.methods.quantizers.normal_float._bits import pack, unpack
from luthier.registry import quantizer


@quantizer(
    paper="arXiv:2401.06118",
    provides=[QUANTIZED_WEIGHTS],
    contract={
        "idempotent": (
            "k-means on the centroids of k-means may give other centroids, as its starts are chosen by norm"
        )
    },
    use_when="you go to about 2 to 4 bits a weight by codes for several weights at once, to be"
    " improved by `pv_tuning`.",
    costs="nbits_per_codebook / in_group_size bits a weight plus a code book a layer; k-means at the start.",
)
class VQ(Quantizer):
    """A code for several weights at once: nbits_per_codebook / in_group_size bits each."""

    continuous: ClassVar[tuple[str, ...]] = ("book", "scale")

    nbits_per_codebook: Annotated[int, Field(ge=1, le=8)] = 8  # bits of a code
    in_group_size: Annotated[int, Field(ge=1)] = 2  # weights per code
    iterations: Annotated[int, Field(ge=0)] = 10  # iterations of k-means

    def __post_init__(self):
        if self.in_group_size < 1:
            raise RecipeError("in_group_size must be at least 1")

    @property
    def together(self):
        return self.in_group_size

    def quantize(self, W, stats=None):
        scale = W.float().square().mean(1).sqrt()
        points = self.points(W, scale)
        k = 2**self.nbits_per_codebook
        order = (
            (points * points.new_tensor([1.0 / (i + 1) for i in range(self.in_group_size)])).sum(1).argsort()
        )
        some = points[
            order[torch.linspace(0, len(points) - 1, min(len(points), 64 * k), device=W.device).long()]
        ]
        book = some[torch.linspace(0, len(some) - 1, k, device=W.device).long()].clone()
        for _ in range(self.iterations):
            own = closest(some, book)
            count = torch.zeros(k, device=W.device).index_add_(0, own, torch.ones(len(own), device=W.device))
            total = torch.zeros_like(book).index_add_(0, own, some)
            book = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], book)
        return self.nearest(W, {"book": book.to(torch.float16), "scale": scale})

    def points(self, W, scale):
        """[out, in] -> [codes, in_group_size], each row divided by its scale and filled up with zeros."""
        wide = F.pad(W.float() / scale.clamp(min=1e-30)[:, None], (0, -W.shape[1] % self.in_group_size))
        return wide.view(-1, self.in_group_size)

    def nearest(self, W, codes):
        own = closest(self.points(W, codes["scale"].float()), codes["book"].float())
        return {**codes, "weight": pack(own.to(torch.uint8), self.nbits_per_codebook)}

    def dequantize(self, codes, shape, dtype):
        n = shape[0] * -(-shape[1] // self.in_group_size)
        places = unpack(codes["weight"], self.nbits_per_codebook, n).int()
        wide = codes["book"].float().index_select(0, places).view(shape[0], -1)
        return (wide[:, : shape[1]] * codes["scale"].float()[:, None]).to(dtype)

    def bits(self, shape):
        codes = shape[0] * -(-shape[1] // self.in_group_size)
        book = 16 * self.in_group_size * 2**self.nbits_per_codebook
        return (self.nbits_per_codebook * 8 * -(-codes // 8) + book + 32 * shape[0]) / (shape[0] * shape[1])


def closest(points, book):
    """[n, d], [k, d] -> [n] which is nearest."""
    half = book.square().sum(1) / 2
    return torch.cat([(half - p @ book.T).argmin(1) for p in points.split(2**15)])
