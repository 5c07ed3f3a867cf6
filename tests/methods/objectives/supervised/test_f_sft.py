"""f_sft: is sft where the curve is straight; weighs by the slope of its curve; chi2 stays nearer to the
reference.
"""

from __future__ import annotations

import torch

from helpers.objectives import average, batch_of, cast, gradients, make_rows, same
from luthier.registry import build


def test_f_sft_is_sft_where_the_curve_is_straight():
    found = []
    for spec, times in (({"name": "f_sft", "beta": 0.3, "divergence": "total_variation"}, 1.0), ("sft", 0.3)):
        roles = cast()
        (times * average(build("objective", spec), roles, batch_of(make_rows(3, k=1)))).backward()
        found.append(gradients(roles.policy.model))
    same(*found)


def test_f_sft_weighs_by_the_slope_of_its_curve():
    rows, roles = make_rows(3, k=1), cast()
    made = build("objective", {"name": "f_sft", "beta": 0.3, "divergence": "chi2", "level": "sequence"})
    batch = batch_of(rows)
    r = 0.3 * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch))
    grads = torch.autograd.grad(
        made.loss(roles, batch).sum(), list(roles.policy.model.parameters()), retain_graph=True
    )
    want = torch.autograd.grad(-(r * (1 - r.detach() / 2)).sum(), list(roles.policy.model.parameters()))
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert made.count(batch) == 3


def test_chi2_stays_nearer_to_the_reference():
    from luthier.toy import bandit

    base, kl = torch.randn(20, generator=torch.Generator().manual_seed(0)), {}
    rows = bandit.pulled([[3], [5], [3]], torch.ones(20))
    for divergence in ("total_variation", "chi2"):
        policy = bandit.Arms(base)
        roles, sgd = bandit.roles_of(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
        for _ in range(60):
            sgd.zero_grad()
            bandit.average(
                build("objective", {"name": "f_sft", "beta": 0.5, "divergence": divergence}), roles, rows
            ).backward()
            sgd.step()
        logp = policy.log_policy().detach()
        kl[divergence] = float((logp.exp() * (logp - base.log_softmax(-1))).sum())
    assert 0 < kl["chi2"] < kl["total_variation"]
