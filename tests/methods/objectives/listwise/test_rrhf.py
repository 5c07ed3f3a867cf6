"""rrhf: the value by hand, and no ranking loss where the order is right."""

from __future__ import annotations

import torch

from helpers.objectives import batch_of, cast, loss_of, make_rows


def test_the_loss_by_hand():
    roles, rows = cast(), make_rows(2, k=3)
    batch = batch_of(rows)
    sums = batch.sums(roles.policy.logprobs(batch)).detach()
    for power in (1.0, 0.5):
        values = (sums / batch.lengths**power).view(2, 3).tolist()
        loss = loss_of({"name": "rrhf", "length_penalty": power}, roles, rows).detach()
        for row, own, total, got in zip(rows, values, sums.view(2, 3).tolist(), loss.tolist()):
            scores = row["scores"]
            pairs = [(i, j) for i in range(3) for j in range(3) if scores[i] < scores[j]]
            ranking = sum(max(0.0, own[i] - own[j]) for i, j in pairs)
            best = -total[scores.index(max(scores))]
            torch.testing.assert_close(torch.tensor(got), torch.tensor(ranking + best), atol=1e-4, rtol=1e-5)


def test_no_ranking_loss_where_the_order_agrees():
    roles, rows = cast(), make_rows(2, k=3)
    batch = batch_of(rows)
    means = batch.means(roles.policy.logprobs(batch)).view(2, 3).tolist()
    agree = [{**row, "scores": own} for row, own in zip(rows, means)]
    against = [{**row, "scores": [-x for x in own]} for row, own in zip(rows, means)]
    spec = {"name": "rrhf", "sft": 0.0}
    assert loss_of(spec, roles, agree).abs().max() == 0.0
    assert loss_of(spec, roles, against).min() > 0.0
