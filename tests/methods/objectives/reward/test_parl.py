"""parl: the gradient of the upper level, through a policy that follows from the reward."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier.errors import RecipeError
from luthier.registry import build
from luthier.toy import bandit

BETA = 0.5
TRUE = torch.tensor([0.0, 1.0, 0.3, 2.0, -1.0], dtype=torch.double)
FEATURES = torch.tensor([0.2, 0.9, -0.4, 1.1, 0.5], dtype=torch.double)
REFERENCE = torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1], dtype=torch.double)


class OneNumber(nn.Module):
    """A reward model of one parameter over five arms."""

    def __init__(self, value: float):
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(value, dtype=torch.double))

    def outputs(self, batch):
        return SimpleNamespace(values=self.nu * FEATURES[batch.labels[batch.targets]])


def policy(nu: torch.Tensor) -> torch.Tensor:
    """[5] the optimum of reward under the KL penalty."""
    return (REFERENCE + nu * FEATURES / BETA).softmax(0)


def upper(nu: torch.Tensor) -> torch.Tensor:
    """The expected preference loss over two samples of the policy."""
    likely, reward = policy(nu), nu * FEATURES
    preferred = (torch.sign(TRUE[:, None] - TRUE) + 1) / 2
    pairs = F.binary_cross_entropy_with_logits(reward[:, None] - reward, preferred, reduction="none")
    return likely @ pairs @ likely


def expected_gradient(nu: float, **settings) -> float:
    """Of the objective, over every row of three samples with its probability."""
    model, likely = OneNumber(nu), policy(torch.tensor(nu, dtype=torch.double))
    arms = [list(row) for row in itertools.product(range(5), repeat=3)]
    weights = torch.stack([likely[row].prod() for row in arms])
    batch = bandit.batch_of(bandit.pulled(arms, TRUE))
    objective = build("objective", {"name": "parl", "beta": BETA, **settings})
    (objective.loss(SimpleNamespace(policy=model), batch) * weights).sum().backward()
    return float(model.nu.grad)


@pytest.mark.parametrize("nu", [-0.4, 0.3, 1.2])
def test_the_gradient_is_that_of_finite_differences(nu):
    step = 1e-5
    ends = [upper(torch.tensor(nu + side * step, dtype=torch.double)) for side in (1, -1)]
    wanted = float(ends[0] - ends[1]) / (2 * step)
    assert expected_gradient(nu) == pytest.approx(wanted, abs=1e-3)
    assert abs(expected_gradient(nu, distribution=False) - wanted) > 1e-2


def test_the_term_changes_no_value():
    rows = bandit.pulled([[0, 1, 3], [2, 4, 4]], TRUE)
    values = []
    for settings in ({}, {"distribution": False}):
        objective = build("objective", {"name": "parl", **settings})
        values.append(objective.loss(SimpleNamespace(policy=OneNumber(0.7)), bandit.batch_of(rows)))
    assert torch.equal(*values)


def test_a_stage_that_draws_two_samples_is_refused():
    objective, stage = build("objective", "parl"), build("stage", {"name": "rollout", "n": 2})
    with pytest.raises(RecipeError, match="stage 'rollout' draws 2"):
        objective.suits_recipe(None, SimpleNamespace(online_stages=[stage]))
    build("objective", {"name": "parl", "distribution": False}).suits_recipe(
        None, SimpleNamespace(online_stages=[stage])
    )


def test_two_samples_are_learned_without_the_term_and_a_sentence_says_so():
    batch = bandit.batch_of(bandit.pulled([[0, 1]], TRUE))
    policy = SimpleNamespace(policy=OneNumber(0.7))
    losses = [
        build("objective", {"name": "parl", "distribution": distribution}).loss(policy, batch)
        for distribution in (True, False)
    ]
    assert torch.equal(*losses)
    rows = [{"completions": ["a", "b"]}, {"completions": ["a", "b", "c"]}]
    assert "1 of 2 rows" in build("objective", "parl").row_warnings(rows)[0]
    assert not build("objective", {"name": "parl", "distribution": False}).row_warnings(rows)
