"""rwr: between sft and the best."""

from __future__ import annotations

import torch

from helpers.objectives import batch_of, cast, loss_of, make_rows
from luthier.registry import build


def test_rwr_between_sft_and_the_best():
    roles, rows = cast(), make_rows(3, k=3)
    batch = batch_of(rows)
    nll = -batch.sums(roles.policy.logprobs(batch)).detach()
    torch.testing.assert_close(
        loss_of({"name": "rwr", "beta": 1e6}, roles, rows).detach(), nll, atol=1e-3, rtol=1e-4
    )
    best = batch.column("scores") == 2.0
    only = loss_of({"name": "rwr", "beta": 1e-3}, roles, rows).detach()
    torch.testing.assert_close(only, torch.where(best, 3 * nll, 0.0), atol=1e-4, rtol=1e-4)


def test_rows_without_a_ranking_are_told():
    alone = [{"completions": ["a"], "scores": [s]} for s in (-5.0, 5.0, 0.0)]
    (sentence,) = build("objective", "rwr").row_warnings(alone)
    assert "plain SFT" in sentence
    assert not build("objective", "rwr").row_warnings([{"completions": ["a", "b"], "scores": [1.0, 2.0]}])
