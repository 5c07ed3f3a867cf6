"""rwr: between sft and the best."""

from __future__ import annotations

import torch

from helpers.objectives import batch_of, cast, loss_of, make_rows


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
