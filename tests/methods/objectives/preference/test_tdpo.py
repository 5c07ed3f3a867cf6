"""tdpo: by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.objectives import batch_of, cast, loss_of, pair_rows


def test_tdpo_by_hand():
    from helpers.objectives import by_hand, full_logits

    roles, rows = cast(), pair_rows()
    batch = batch_of(rows)
    p, q = (full_logits(roles, who, rows).softmax(-1) for who in ("policy", "reference"))
    drift = batch.sums(by_hand(q, p)).view(-1, 2)
    ratio = batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach().view(-1, 2)
    best = torch.tensor([r["scores"].index(1.0) for r in rows])
    pick = [x.gather(1, i[:, None]).squeeze(1) for x in (ratio, drift) for i in (best, 1 - best)]
    for alpha, second in ((0.5, True), (1.0, False)):
        margin = pick[0] - pick[1] - alpha * (pick[3] - pick[2])
        got = loss_of({"name": "tdpo", "beta": 0.3, "alpha": 0.5, "if_tdpo2": second}, roles, rows).detach()
        torch.testing.assert_close(got, -F.logsigmoid(0.3 * margin), atol=1e-5, rtol=1e-4)
