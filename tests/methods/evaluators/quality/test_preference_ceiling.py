"""preference_ceiling: the bound on the loss, the optimum in its limits, and the direction of flips."""

from __future__ import annotations

import math
import random

import pytest
import torch

from helpers.stages import make_roles
from luthier.methods.evaluators.quality.preference_ceiling import (
    PreferenceCeiling,
    dpo_loss,
    flip_loss,
    idealized,
)

ROWS = [
    {"id": str(i), "prompt": f"{i}+1=", "completions": [str(i + 1), str(i + 2) * 2], "scores": [1.0, 0.0]}
    for i in range(8)
]


def test_ranked_right_is_a_bound_on_the_loss():
    rng = torch.Generator().manual_seed(0)
    own, other = (5 * torch.randn(4000, generator=rng, dtype=torch.float64) for _ in range(2))
    for beta in (0.01, 0.1, 2.0):
        assert torch.equal(own > 0, dpo_loss(own, other, beta) < flip_loss(other, beta))


def test_the_optimum_in_its_limits():
    margin = torch.linspace(-4, 4, 9, dtype=torch.float64)
    half = torch.full_like(margin, 0.5)
    assert torch.equal(idealized(margin, half, 0.1), margin > 0)
    shares = torch.tensor([0.9, 0.2, 0.6, 0.4, 0.5, 0.7, 0.3, 0.51, 0.49], dtype=torch.float64)
    apart = shares != 0.5
    assert torch.equal(idealized(margin, shares, 1e-6)[apart], (shares > 0.5)[apart])
    # of one pair by hand: the ratio pi*(w) / pi*(l)
    ratio = math.exp(-1.0) * (0.8 / 0.2) ** (1 / 0.5)
    assert bool(idealized(torch.tensor([-1.0]), torch.tensor([0.8]), 0.5)) == (ratio > 1)


def test_a_model_beside_itself(tiny_roles, tmp_path):
    assert float(dpo_loss(torch.tensor([3.0]), torch.tensor([3.0]), 0.1)) == pytest.approx(math.log(2))
    metrics = PreferenceCeiling(agreement=0.5).run(tiny_roles, ROWS, tmp_path, "before")
    assert metrics["flipped_pairs"] == 0.0
    assert metrics["ranking_gap"] == pytest.approx(0.0)  # the optimum ranks as the reference does
    assert PreferenceCeiling().run(tiny_roles, [], tmp_path, "before") == {}


def test_easy_pairs_flip_first(shallow, tmp_path):
    """Two steps of DPO turn many pairs right; those that the reference makes hard stay wrong."""
    words = random.Random(0)
    word = lambda size: "".join(words.choice("abcdefghij") for _ in range(size))
    rows = []
    for i in range(48):
        sides = [word(4), word(4)]
        rows.append({"id": f"{i:02}", "prompt": f"{word(3)}?", "completions": sides, "scores": [1.0, 0.0]})
    roles = make_roles(shallow)
    roles.reference = make_roles(shallow).policy.as_role("reference")
    evaluator = PreferenceCeiling(agreement=0.9)
    before = evaluator.run(roles, rows, tmp_path, "before")
    optimizer = torch.optim.Adam(roles.policy.parameters(), lr=1e-3)
    for _ in range(2):
        batch = roles.batch(rows)
        own, other = (batch.sums(who.logprobs(batch)).view(-1, 2) for who in (roles.policy, roles.reference))
        loss = dpo_loss(own[:, 0] - own[:, 1], other[:, 0] - other[:, 1], 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = evaluator.run(roles, rows, tmp_path, "after")
    assert after["flipped_pairs"] > 0.1 > before["flipped_pairs"] == 0.0
    assert after["ranking_gap"] < before["ranking_gap"] - 0.1
    assert after["unflipped_difficulty"] > 1.2 * before["unflipped_difficulty"]
