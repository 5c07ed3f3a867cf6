"""opponent, mixed_rollout: whose samples are added; the mixture's next token; a share of sampled rows;
XPO's loss.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from helpers.objectives import batch_of, cast, loss_of, make_rows
from helpers.stages import rollout, rows_with
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.registry import build


def opponent(**settings):
    return build("stage", {"name": "opponent", "max_new_tokens": 6, **settings})


def test_samples_are_added_behind(roles):
    rows = rollout(n=2)(rows_with(set(), 4), roles)
    out = opponent()(rows, roles)
    for row, other in zip(rows, out, strict=True):
        assert other["completions"][:2] == row["completions"] and len(other["completions"]) == 3
        assert other["opponent"] == [False, False, True] and len(other["truncated"]) == 3
    assert opponent()(rows, roles) == out


def test_the_mixture_is_geometric(roles, monkeypatch):
    """At 1 the reference writes, at 0 the policy; in between log-probabilities are mixed."""
    network = copy.deepcopy(roles.policy.model)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * p.std() * torch.randn(p.shape, generator=rng))
    other = Policy(roles.policy.architecture, network, Untuned(network), "reference", nullcontext)
    monkeypatch.setattr(roles, "reference", other)
    rows = rollout(n=1)(rows_with(set(), 3), roles)
    written = []
    for settings in ({"by": "mixture", "mixture_coef": 0.0}, {"by": "mixture", "mixture_coef": 1.0}, {}):
        written.append([row["completions"][1] for row in opponent(**settings)(rows, roles)])
    assert written[0] != written[1] == written[2]
    logits = list(torch.randn(2, 4, 9, generator=rng))
    half = opponent(mixture_coef=0.5).mixture(logits).log_softmax(-1)
    product = (logits[0].softmax(-1) * logits[1].softmax(-1)).sqrt()
    torch.testing.assert_close(half.exp(), product / product.sum(-1, keepdim=True))


def test_a_share_of_the_rows_is_sampled(roles):
    rows = [{"id": f"r{i}", "prompt": f"what is {i}?", "completions": ["given"]} for i in range(40)]
    counts = {}
    for share in (0.0, 0.5, 1.0):
        out = list(
            build("stage", {"name": "mixed_rollout", "share": share, "max_new_tokens": 2})(rows, roles)
        )
        assert [row["id"] for row in out] == [row["id"] for row in rows]
        counts[share] = sum(row["completions"] != ["given"] for row in out)
    assert counts[0.0] == 0 and 10 < counts[0.5] < 30 and counts[1.0] == 40


def test_xpo_is_dpo_and_optimism():
    rows, roles = make_rows(3, k=2), cast()
    for row in rows:
        row["opponent"] = [False, True]
    dpo, xpo = loss_of("dpo", roles, rows), loss_of({"name": "xpo", "alpha": 0.2}, roles, rows)
    likely = roles.policy.logprobs(batch_of(rows)).split([len(c) for row in rows for c in row["completions"]])
    want = dpo + 0.2 * torch.stack([likely[2 * i + 1].sum() for i in range(3)])
    torch.testing.assert_close(xpo, want)
    assert loss_of({"name": "xpo", "alpha": 0.0}, roles, rows).tolist() == pytest.approx(dpo.tolist())
