"""advantages, greedy_baseline: estimates by the recursion, normalised over all rows; the greedy answer's
score.
"""

from __future__ import annotations

import pytest
import torch

from helpers.stages import rollout, rows_with
from luthier.methods.stages.rollout.advantages import gae
from luthier.model.batch import collate
from luthier.registry import build, provides_of, requires_of
from luthier.text.encode import Encoded


def batch_of(lengths: list[int]):
    rows = [{"id": str(n), "prompt": [1], "completions": [[2] * n]} for n in lengths]
    return collate(
        rows, lambda r: Encoded(r["prompt"], r["completions"], [[True] * len(r["completions"][0])])
    )


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_estimates_are_those_of_the_recursion(gamma, lam):
    lengths, rng = [3, 1, 5], torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=rng)
    found = gae(batch_of(lengths), rewards, values, gamma, lam).split(lengths)
    for advantage, r, v in zip(found, rewards.split(lengths), values.split(lengths), strict=True):
        later, after = 0.0, 0.0
        for t in reversed(range(len(r))):
            later = float(r[t] + gamma * after - v[t]) + gamma * lam * later
            after = float(v[t])
            assert float(advantage[t]) == pytest.approx(later, abs=1e-5)


def sampled(roles, **settings):
    rows = rollout(old=True)(rows_with(set(), 5), roles)
    scored = [{**row, "scores": [float(len(c)) for c in row["completions"]]} for row in rows]
    return scored, list(build("stage", {"name": "advantages", **settings})(scored, roles))


def test_advantages_are_normalised_over_all_rows(roles):
    for size in (8, 2):
        rows, out = sampled(roles, batch_size=size)
        flat = torch.tensor([x for row in out for c in row["token_advantages"] for x in c])
        assert float(flat.mean()) == pytest.approx(0, abs=1e-4)
        assert float(flat.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
        assert [[len(c) for c in row["completions"]] for row in rows] == [
            [len(c) for c in row["token_advantages"]] for row in out
        ]


def test_rewards_to_go_and_the_rows_mean(roles):
    rows, out = sampled(roles, whiten=False)
    assert out[0]["token_advantages"][0] == pytest.approx(
        [rows[0]["scores"][0]] * len(rows[0]["completions"][0])
    )
    rows, out = sampled(roles, whiten=False, baseline="group")
    for row, other in zip(rows, out, strict=True):
        mean = sum(row["scores"]) / 3
        assert other["token_advantages"][1] == pytest.approx(
            [row["scores"][1] - mean] * len(row["completions"][1])
        )


def test_the_reference_is_the_policy_and_costs_nothing(roles):
    _, free = sampled(roles, whiten=False)
    _, priced = sampled(roles, whiten=False, kl_coef=1.0)
    for one, other in zip(free, priced, strict=True):
        assert one["token_advantages"][0] == pytest.approx(other["token_advantages"][0], abs=1e-4)


def test_a_critic_and_a_reference_are_asked_for_where_they_are_used():
    plain, ppo = (build("stage", {"name": "advantages", "baseline": b}) for b in ("none", "critic"))
    assert not {"critic", "reference"} & requires_of(plain) and "critic" in requires_of(ppo)
    assert "returns" not in provides_of(plain) and "returns" in provides_of(ppo)
    assert "reference" in requires_of(build("stage", {"name": "advantages", "kl_coef": 0.1}))


def test_the_greedy_baseline_is_the_score_of_the_greedy_answer(roles):
    rows, length = rows_with(set(), 3), {"name": "length", "of": "characters"}
    rows.append(rows[0])
    stage = build("stage", {"name": "greedy_baseline", "reward": length, "max_new_tokens": 8})
    greedy = build("stage", {"name": "score", "reward": length})(
        rollout(n=1, temperature=0.0)(rows, roles), roles
    )
    out = list(stage(rows, roles))
    assert [row["baseline"] for row in out] == [row["scores"][0] for row in greedy]
    assert [row["id"] for row in out] == [row["id"] for row in rows]
