"""Antidote: zeros by Wanda's score over harmful rows."""

import torch

from luthier.methods.tuners.pruned.antidote import Antidote


def test_zeros_are_the_first_of_each_row_by_score():
    rng = torch.Generator().manual_seed(0)
    W, norms = torch.randn(5, 10, generator=rng), torch.rand(10, generator=rng)
    stays = Antidote(ratio=0.35).mask(W, norms)
    for row, mask in zip(W.tolist(), stays.tolist(), strict=True):
        score = [abs(w) * n for w, n in zip(row, norms.tolist(), strict=True)]
        harmful = sorted(range(10), key=score.__getitem__)[-3:]
        assert [i for i in range(10) if not mask[i]] == sorted(harmful)


def test_a_ratio_of_zero_changes_nothing():
    W = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(W * Antidote(ratio=0.0).mask(W, torch.ones(7)), W)


def test_what_reads_harmful_rows_suffers_more_than_by_chance():
    rng = torch.Generator().manual_seed(2)
    W = torch.randn(32, 40, generator=rng)
    scale = torch.full((40,), 0.1)
    harmful = torch.randn(200, 40, generator=rng) * scale.index_fill(0, torch.arange(8), 3.0)
    benign = torch.randn(200, 40, generator=rng) * scale.index_fill(0, torch.arange(20, 40), 3.0)
    stays = Antidote(ratio=0.1).mask(W, harmful.norm(dim=0))
    chance = torch.rand(32, 40, generator=rng).argsort(dim=1) >= 4

    def change(x, mask):
        return ((x @ (W * mask - W).T).norm() / (x @ W.T).norm()).item()

    assert change(harmful, stays) > 2 * change(benign, stays)
    assert change(harmful, stays) > 1.5 * change(harmful, chance)
