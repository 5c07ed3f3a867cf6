"""modpo: finds the policy of the weighted reward."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import fitted, loss_of, pair_rows
from luthier.errors import RecipeError
from luthier.registry import build


def test_modpo_finds_the_policy_of_the_weighted_reward():
    from luthier.toy import bandit

    base = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    own, other = (
        torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.2, -0.5, 0.4], [-0.8, 0.9, 0.1, 0.3])
    )
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    rows = [
        {
            "id": f"{i}{j}",
            "prompt": [0],
            "completions": [[i], [j]],
            "scores": [1.0, 0.0],
            "rewards": {"other": [float(other[i]), float(other[j])]},
        }
        for i, j in pairs
    ]
    likely = torch.tensor([float(torch.sigmoid(own[i] - own[j])) for i, j in pairs])
    expected = []
    for share in (0.1, 0.5, 0.9):
        roles = bandit.roles_of(bandit.Arms(base))
        made = build("objective", {"name": "modpo", "beta": 0.5, "weights": {"other": 1 - share}})
        got = fitted(made, roles, rows, likely)
        want = (base.log_softmax(-1) + (share * own + (1 - share) * other) / 0.5).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=1e-2, rtol=0)
        expected.append((float(got.exp() @ own), float(got.exp() @ other)))
    assert [e[0] for e in expected] == sorted(e[0] for e in expected)
    assert [e[1] for e in expected] == sorted((e[1] for e in expected), reverse=True)
    alone = loss_of(
        {"name": "modpo", "beta": 0.2, "weights": {"other": 0.5}},
        rows=[{**r, "rewards": {"other": [0, 0]}} for r in pair_rows()],
    )
    torch.testing.assert_close(alone, loss_of({"name": "dpo", "beta": 0.4}), atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match="leaves nothing"):
        build("objective", {"name": "modpo", "weights": {"a": 0.6, "b": 0.4}})
    with pytest.raises(RecipeError, match="did you mean 'other'"):
        loss_of(
            {"name": "modpo", "weights": {"othr": 0.5}},
            rows=[{**r, "rewards": {"other": [0, 0]}} for r in pair_rows()],
        )
