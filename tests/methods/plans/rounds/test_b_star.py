"""b_star: balance scores, the grid, and temperatures that rise as the policy narrows."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.rounds import Table, perform, roles_of
from luthier.methods.stages.rollout.balanced_rollout import Answer, balance_score, best_pair
from luthier.registry import build

NAMES = [*(f"right {k}" for k in range(5)), *(f"lure {k}" for k in range(5))]
PROMPTS = [{"id": str(p), "prompt": [p]} for p in range(32)]
TEMPERATURES = [0.4, 0.7, 1.0, 1.5, 2.0, 3.0]
# the reward that selects takes a lure for right, so that warm samples cost something
REWARDS = {"reward": {"name": "regex", "pattern": "."}, "gold": {"name": "regex", "pattern": "right"}}
PLAN = {"name": "b_star", "rounds": 5, "n": 8, "target": 4, "judged": 0, "thresholds": [0.5], **REWARDS}


def test_the_balance_score_by_hand():
    assert balance_score(6, 6, 6) == 1.0
    assert balance_score(0, 5, 6) == 0.0 == balance_score(0, 0, 6)
    assert balance_score(3, 3, 6) == 0.5
    assert balance_score(8, 10, 6) == pytest.approx(0.8)


def test_the_grid_search_is_brute_force():
    rng = torch.Generator().manual_seed(0)
    probes = {}
    for temperature in (0.5, 0.8, 1.2):
        rows = []
        for _ in range(6):
            some = torch.rand(9, 2, generator=rng).tolist()
            rows.append(
                [Answer(str(k % 7), round(score, 3), right > 0.6) for k, (score, right) in enumerate(some)]
            )
        probes[temperature] = rows
    thresholds = [k / 10 for k in range(11)]

    def balance(temperature, threshold):
        total = 0.0
        for answers in probes[temperature]:
            unique = list({a.text: a for a in answers}.values())
            unique = sorted((a for a in unique if a.score >= threshold), key=lambda a: -a.score)[:3]
            right = sum(a.right for a in unique)
            total += min(right / 3, 1) * right / len(unique) if unique else 0
        return total / 6

    every = {pair: balance(*pair) for pair in itertools.product(probes, thresholds)}
    temperature, threshold, value = best_pair(probes, thresholds, 3)
    assert value == pytest.approx(max(every.values())) == every[temperature, threshold]


def test_the_temperature_follows_how_narrow_the_policy_is():
    stage = {
        "name": "balanced_rollout",
        "n": 16,
        "thresholds": [0.5],
        "temperatures": TEMPERATURES,
        **REWARDS,
    }
    chosen = []
    for scale in (1.0, 2.0, 4.0):
        total = 0.0
        for seed in range(3):
            roles = roles_of(Table(scale * policy(seed).logits.detach()), NAMES, seed)
            list(build("stage", stage)(PROMPTS, roles))
            total += roles.stage_metrics["temperature"]
        chosen.append(total / 3)
    assert chosen == sorted(chosen) and chosen[-1] > 2 * chosen[0], chosen


@pytest.mark.long
def test_the_temperature_rises_and_diversity_stays(recipe, tmp_path):
    """Learning its own samples narrows the policy: with a fixed temperature it forgets right answers."""
    how = {"steps": 20, "lr": 0.1}
    for seed in range(2):
        base, folder = policy(seed), tmp_path / str(seed)
        plan = {**PLAN, "temperatures": TEMPERATURES}
        rounds, end = perform(plan, recipe, base, PROMPTS, NAMES, folder / "balanced", **how)
        temperatures = [row["temperature"] for row in end.stats["rounds"]]
        assert temperatures[-1] > 1.5 * temperatures[0], temperatures
        plan = {**PLAN, "temperatures": temperatures[:1]}
        fixed, _ = perform(plan, recipe, base, PROMPTS, NAMES, folder / "fixed", **how)
        assert pass_at(rounds[-1].after, 8) > pass_at(fixed[-1].after, 8) + 0.02
        measured = {"pass_at_k", "best_of_k", "accepted_precision", "distinct_2"}
        assert measured <= end.stats["rounds"][0].keys()


def policy(seed: int) -> Table:
    """Right answers of unequal likelihood, lures less likely than any of them."""
    logits = torch.cat([torch.tensor([1.5, 1.2, 1.0, 0.8, 0.6]), torch.full((5,), -1.0)]).expand(32, 10)
    return Table(logits + 0.3 * torch.randn(32, 10, generator=torch.Generator().manual_seed(seed)))


def pass_at(policy: Table, k: int) -> float:
    """How many of the right answers turn up in k samples."""
    p = policy.log_policy().detach().exp()[:, :5]
    return float((1 - (1 - p) ** k).mean())
