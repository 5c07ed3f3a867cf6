"""vq: a beam over several code books finds the best sums."""

from __future__ import annotations

import itertools

import torch

from helpers.quantizers import normal
from luthier.methods.quantizers.codebook.vq import nearest_sums
from luthier.registry import build


def test_a_beam_over_code_books_finds_the_best_sums():
    points, books = normal(200, 3, seed=1), normal(3, 4, 3, seed=2)
    off = lambda codes: (points - sum(books[i][codes[:, i]] for i in range(3))).square().sum(1)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    sums = sum(books[i][every[:, i]] for i in range(3))
    best = torch.cdist(points, sums).square().amin(1)
    errors = [float(off(nearest_sums(points, books, beam)).mean()) for beam in (1, 2, 4, 64)]
    assert torch.allclose(off(nearest_sums(points, books, 64)), best, atol=1e-4)
    assert errors[0] > errors[2] and errors[0] >= errors[1] >= errors[3] - 1e-6


def test_two_books_err_less_than_one_of_as_many_bits():
    W = normal(48, 64, seed=3)
    settings = {"in_group_size": 4, "nbits_per_codebook": 4}
    found = {}
    for name, more in {
        "one": {},
        "two": {"num_codebooks": 2},
        "beam": {"num_codebooks": 2, "beam_size": 8},
    }.items():
        q = build("quantizer", {"name": "vq", **settings, **more})
        codes = q.quantize(W)
        found[name] = float((q.dequantize(codes, (48, 64), torch.float32) - W).square().mean())
        own = {k: v for k, v in codes.items()}
        assert torch.equal(q.nearest(q.dequantize(own, (48, 64), torch.float32), own)["book"], codes["book"])
    assert found["two"] < 0.75 * found["one"] and found["beam"] <= found["two"]
