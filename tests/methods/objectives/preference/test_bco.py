"""bco: shifts by the middle and needs no pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.objectives import batch_of, cast, loss_of, make_rows


def test_bco_shifts_by_the_middle_and_needs_no_pairs():
    rows = [{**r, "scores": [1.0 if i % 2 else -1.0]} for i, r in enumerate(make_rows(4, k=1))]
    roles, batch = cast(), batch_of(rows)
    reward = 0.1 * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach()
    shift = (reward[1::2].mean() + reward[::2].mean()) / 2
    sign = torch.tensor([1.0 if i % 2 else -1.0 for i in range(4)])
    torch.testing.assert_close(
        loss_of("bco", roles, rows).detach(), -F.logsigmoid(sign * (reward - shift)), atol=1e-6, rtol=1e-5
    )
