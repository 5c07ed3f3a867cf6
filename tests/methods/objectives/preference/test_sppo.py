"""sppo: multiplies by how often an answer wins; stays near the equilibrium of rock paper scissors; win rates
of scores.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import fitted
from luthier.registry import build


def sppo_round(base: torch.Tensor, wins: torch.Tensor, beta: float) -> torch.Tensor:
    """One exact round: every arm, weighed as the policy pulls it, regressed on how often it beats the
    policy.
    """
    from luthier.toy import bandit

    pi = base.softmax(-1)
    rates, arms = wins @ pi, len(base)
    best, worst = int(rates.argmax()), int(rates.argmin())
    rows, weights = [], []
    # a row of an arm with itself would be a tie: each arm stands beside the two extremes
    for i in range(arms):
        j = worst if i != worst else best
        scores = [1.0, 0.0] if rates[i] > rates[j] else [0.0, 1.0]
        rows.append(
            {
                "id": str(i),
                "prompt": [0],
                "completions": [[i], [j]],
                "scores": scores,
                "win_rates": [float(rates[i]), float(rates[j])],
            }
        )
        weights.append(float(pi[i]))
    roles = bandit.roles_of(bandit.Arms(base))
    return fitted(build("objective", {"name": "sppo", "beta": beta}), roles, rows, torch.tensor(weights))


def test_sppo_multiplies_by_how_often_an_answer_wins():
    base = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
    wins = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.6], [0.7, 0.4, 0.5]], dtype=torch.float64)
    got = sppo_round(base, wins, beta=5.0)
    want = (base.log_softmax(-1) + (wins @ base.softmax(-1) - 0.5) / 5.0).log_softmax(-1)
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)


@pytest.mark.long
def test_sppo_stays_near_the_equilibrium_of_rock_paper_scissors():
    from luthier.toy import bandit

    wins = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    base, mean = torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64), []
    for _ in range(66):  # two times round
        base = sppo_round(base, wins, beta=1.5)
        mean.append(base.exp())
    assert float((torch.stack(mean).mean(0) - 1 / 3).abs().max()) < 0.1
    policy = bandit.Arms(torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64))
    roles, adam = bandit.roles_of(policy), torch.optim.Adam(policy.parameters(), lr=0.05)
    # what is seen of it: paper beats rock
    rows = [{"id": "a", "prompt": [0], "completions": [[0], [1]], "scores": [0.0, 1.0]}]
    for _ in range(200):
        adam.zero_grad()
        bandit.average(build("objective", "dpo"), roles, rows).backward()
        adam.step()
    assert float(policy.log_policy().detach().exp()[0]) < 0.05, "DPO goes on for ever"


def test_win_rates_of_scores():
    from luthier.recipe.validate import DryRunRoles

    row = {"id": "a", "prompt": "p", "completions": ["x", "y", "z"], "scores": [2.0, 0.0, 0.0]}
    (out,) = build("stage", "win_rates")([row], DryRunRoles())
    two = float(torch.sigmoid(torch.tensor(2.0)))
    assert out["win_rates"] == pytest.approx([(0.5 + 2 * two) / 3, (1 - two + 1) / 3, (1 - two + 1) / 3])
    assert sum(out["win_rates"]) == pytest.approx(1.5)
