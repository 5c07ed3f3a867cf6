"""Masked diffusion with an autoregressive energy, on texts that can be counted."""

from __future__ import annotations

import itertools

import pytest
import torch

from luthier.clock import Clock
from luthier.methods.decoders.search.edlm import Models
from luthier.registry import build

MASK = 2  # beside the tokens 0 and 1
PLACES = 8


def neighbours(text: torch.Tensor) -> torch.Tensor:
    """[8] -> [8, 3] logits of a denoiser that is exact place by place: where the neighbour of a pair (0 and
    1, 2 and 3, ...) is revealed, the same token, else either.
    """
    other = text.view(-1, 2).flip(1).flatten()
    logits = torch.full((PLACES, 3), -50.0)
    for token in (0, 1):
        logits[:, token] = torch.where((other == MASK) | (other == token), 0.0, -50.0)
    return logits


def agreement(texts: torch.Tensor) -> torch.Tensor:
    """[k, 8] -> [k] log-probability of texts whose neighbours agree; a disagreement costs 20 nats."""
    return -20.0 * (texts[:, 0::2] != texts[:, 1::2]).sum(1).float()


EXACT = Models(neighbours, agreement)


def violations(texts: int, **settings) -> float:
    decoder = build("decoder", {"name": "edlm", "steps": 2, "window": [0.0, 1.0], **settings})
    written = torch.stack([decoder.write(EXACT, PLACES, MASK, Clock(seed)) for seed in range(texts)])
    assert (written != MASK).all()
    return float((agreement(written) < -1).float().mean())


@pytest.mark.long
def test_neighbours_agree_more_often():
    """Two steps of independent draws break 1 - (3/4)^4 = 68 % of texts."""
    plain, corrected = violations(300, candidates=1), violations(300, candidates=16)
    assert abs(plain - (1 - 0.75**4)) < 0.1
    assert corrected < plain / 2


def test_one_candidate_is_the_plain_sampler():
    """Nothing else is drawn, and a choice outside of the window is none."""
    never = Models(neighbours, lambda texts: 1 / 0)
    for seed in range(20):
        texts = []
        for settings in ({"candidates": 1, "window": [0.0, 1.0]}, {"candidates": 16, "window": [2.0, 3.0]}):
            decoder = build("decoder", {"name": "edlm", "steps": 4, **settings})
            texts.append(decoder.write(never, PLACES, MASK, Clock(seed)).tolist())
        assert texts[0] == texts[1]


@pytest.mark.long
def test_many_candidates_give_the_autoregressive_distribution():
    """One step over all texts of three tokens: from a uniform denoiser to any distribution."""
    every = torch.tensor([*itertools.product((0, 1), repeat=3)])
    target = torch.randn(8, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    models = Models(
        lambda text: torch.zeros(3, 3), lambda texts: target[(texts * torch.tensor([4, 2, 1])).sum(1)]
    )
    decoder = build("decoder", {"name": "edlm", "steps": 1, "candidates": 24, "window": [0.0, 1.0]})
    counts = torch.zeros(8)
    draws = 300
    for seed in range(draws):
        counts[(every == decoder.write(models, 3, MASK, Clock(seed))).all(1)] += 1
    assert (counts / draws - target.exp()).abs().sum() / 2 < 0.12
    assert (target.exp() - 1 / 8).abs().sum() / 2 > 0.25
