"""VQ: vector quantization. Each few weights in a row are coded as one of 2**bits learned vectors of their
layer, fitted by k-means.

AQLM's codes (arXiv:2401.06118), with one scale per output: one code book, or several whose vectors are added.
Each further book is fitted to what the ones before it leave. Codes of several books are found by a beam
search: book after book the `beam_size` best sums go on, and then each code is chosen anew with the others
given. Departs from AQLM in how books are fitted: by k-means on the weights alone, not on the layer's outputs,
with initial centroids spread by norm, so nothing is random.
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
    num_codebooks: Annotated[int, Field(ge=1)] = 1  # code books whose vectors are added
    beam_size: Annotated[int, Field(ge=1)] = 1  # sums that go on in the search for codes of several books
    iterations: Annotated[int, Field(ge=0)] = 10  # iterations of k-means

    def __post_init__(self):
        if self.in_group_size < 1:
            raise RecipeError("in_group_size must be at least 1")

    @property
    def together(self):
        return self.in_group_size

    def quantize(self, W, stats=None):
        scale = W.float().square().mean(1).sqrt()
        left, books = self.points(W, scale), []
        for _ in range(self.num_codebooks):
            books.append(self.fit(left))
            left = left - books[-1][closest(left, books[-1])]
        book = books[0] if self.num_codebooks == 1 else torch.stack(books)
        return self.nearest(W, {"book": book.to(torch.float16), "scale": scale})

    def fit(self, points):
        """[n, in_group_size] -> a code book for them, [2**nbits_per_codebook, in_group_size]."""
        k = 2**self.nbits_per_codebook
        order = (
            (points * points.new_tensor([1.0 / (i + 1) for i in range(self.in_group_size)])).sum(1).argsort()
        )
        spaced = torch.linspace(0, len(points) - 1, min(len(points), 64 * k), device=points.device)
        some = points[order[spaced.long()]]
        book = some[torch.linspace(0, len(some) - 1, k, device=points.device).long()].clone()
        for _ in range(self.iterations):
            own = closest(some, book)
            count = torch.zeros(k, device=own.device).index_add_(
                0, own, torch.ones(len(own), device=own.device)
            )
            total = torch.zeros_like(book).index_add_(0, own, some)
            book = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], book)
        return book

    def points(self, W, scale):
        """[out, in] -> [codes, in_group_size], each row divided by its scale and filled up with zeros."""
        wide = F.pad(W.float() / scale.clamp(min=1e-30)[:, None], (0, -W.shape[1] % self.in_group_size))
        return wide.view(-1, self.in_group_size)

    def nearest(self, W, codes):
        points, book = self.points(W, codes["scale"].float()), codes["book"].float()
        own = closest(points, book) if book.ndim == 2 else nearest_sums(points, book, self.beam_size)
        return {**codes, "weight": pack(own.flatten().to(torch.uint8), self.nbits_per_codebook)}

    def dequantize(self, codes, shape, dtype):
        n, book = shape[0] * -(-shape[1] // self.in_group_size), codes["book"].float()
        if book.ndim == 2:
            book = book[None]
        places = unpack(codes["weight"], self.nbits_per_codebook, n * len(book)).int().view(n, len(book))
        vectors = book[0].index_select(0, places[:, 0])
        for i in range(1, len(book)):
            vectors = vectors + book[i].index_select(0, places[:, i])
        wide = vectors.view(shape[0], -1)
        return (wide[:, : shape[1]] * codes["scale"].float()[:, None]).to(dtype)

    def bits(self, shape):
        codes = shape[0] * -(-shape[1] // self.in_group_size) * self.num_codebooks
        book = 16 * self.in_group_size * 2**self.nbits_per_codebook * self.num_codebooks
        return (self.nbits_per_codebook * 8 * -(-codes // 8) + book + 32 * shape[0]) / (shape[0] * shape[1])


def closest(points, book):
    """[n, d], [k, d] -> [n] which is nearest."""
    half = book.square().sum(1) / 2
    return torch.cat([(half - p @ book.T).argmin(1) for p in points.split(2**15)])


def nearest_sums(points: torch.Tensor, books: torch.Tensor, beam: int) -> torch.Tensor:
    """[n, d], [books, k, d] -> [n, books] codes whose vectors add up to nearly the points: by a beam over the
    books, then by choosing each code once more.
    """
    return torch.cat([_search(part, books, beam) for part in points.split(2**12)])


def _search(points: torch.Tensor, books: torch.Tensor, beam: int) -> torch.Tensor:
    """As `nearest_sums`, of some points at once."""
    codes = points.new_zeros(len(points), 1, 0, dtype=torch.long)
    left = points[:, None]  # [n, beams, d] what the sums leave
    for book in books:
        left, codes = _best(left, codes, book, beam, codes.shape[2])
    for i, book in enumerate(books):
        left = left + book[codes[:, :, i]]  # without this code
        left, codes = _best(left, codes, book, beam, i)
    return codes[:, 0]


def _best(
    left: torch.Tensor, codes: torch.Tensor, book: torch.Tensor, beam: int, place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each sum every code of a book at this place: what the best different ones leave, best first, and
    their codes.
    """
    n, k = len(left), len(book)
    norms = left.square().sum(-1)[..., None] - 2 * left @ book.T + book.square().sum(-1)
    order = norms.view(n, -1).topk(min(beam, norms[0].numel()), largest=False).indices
    parent, code = order // k, order % k
    rows = torch.arange(n, device=left.device)[:, None]
    codes = codes[rows, parent]
    if place == codes.shape[2]:
        codes = torch.cat([codes, code[..., None]], 2)
    else:
        codes = codes.clone()
        codes[:, :, place] = code
    return left[rows, parent] - book[code], codes
