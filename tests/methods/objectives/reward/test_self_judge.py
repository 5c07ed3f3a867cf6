"""self_judge: its loss, its rows, and a judge that rates better than it did."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import pearsonr

from helpers.models import make_llama, make_tokenizer
from helpers.objectives import batch_of, cast, make_rows
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.rewards.judges import rating_judge
from luthier.methods.stages._base import completion_logprobs
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer


def test_without_kl_it_is_regression():
    roles, rows = cast(), make_rows(3, k=4)
    for place, row in enumerate(rows):
        columns = {"scores": [1.0, 2.0, 3.0, 4.0], "quality": 1.5 + place}
        row |= {**columns, "reference_ratings": [0.1, 0.2, 0.3, 0.4]}
    batch = batch_of(rows)
    likely = batch.sums(roles.policy.logprobs(batch)).view(3, 4).softmax(1)
    error = ((likely * torch.arange(1.0, 5.0)).sum(1) - torch.tensor([1.5, 2.5, 3.5])).square()
    plain = build("objective", {"name": "self_judge", "kl_coef": 0.0}).loss(roles, batch)
    torch.testing.assert_close(plain, error, atol=1e-5, rtol=1e-5)
    informed = torch.tensor([0.1, 0.2, 0.3, 0.4])
    divergence = (informed * (informed.log() - likely.log())).sum(1)
    both = build("objective", {"name": "self_judge", "kl_coef": 0.7}).loss(roles, batch)
    torch.testing.assert_close(both, error + 0.7 * divergence, atol=1e-5, rtol=1e-5)


def real() -> Roles:
    net = make_llama(0)
    return Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))


def test_ratings_and_likeness_are_joined():
    roles = real()
    rows = [{"id": "a", "prompt": "2+2", "answer": "4", "completions": ["4", "a long way off"]}]
    ratings, alike, mixed = (
        build("stage", {"name": "self_ratings", "likeness": w})(rows, roles) for w in (0.0, 1.0, 0.5)
    )
    assert alike[0]["quality"] == pytest.approx(5.0, abs=1e-4)
    assert 1.0 <= alike[1]["quality"] < 4.99
    for rating, like, both in zip(ratings, alike, mixed, strict=True):
        assert sum(rating["reference_ratings"]) == pytest.approx(1.0) and "A right" not in rating["prompt"]
        mean = sum(k * p for k, p in enumerate(rating["reference_ratings"], 1))
        assert rating["quality"] == pytest.approx(mean)
        assert both["quality"] == pytest.approx((mean + like["quality"]) / 2)


def test_the_judge_reads_what_it_was_tuned_on(monkeypatch):
    roles = real()
    monkeypatch.setattr(rating_judge, "loaded", lambda model, dtype: roles)
    row = {"id": "a", "prompt": "2+2", "answer": "4", "completions": ["4", "5"]}
    scores = build("reward", "rating_judge").scores(row, row["completions"])
    made = build("stage", "self_ratings")([row], roles)
    for score, logs in zip(scores, completion_logprobs(roles.policy, roles, made, 1), strict=True):
        likely = torch.tensor([sum(tokens) for tokens in logs]).softmax(0)
        assert score == pytest.approx(float(likely @ torch.arange(1.0, 6.0)), abs=1e-4)


class Judge(torch.nn.Module):
    """Logits of five ratings, linear in what is known of an answer."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)))

    def logprobs(self, batch):
        features = torch.tensor([row["features"] for row in batch.rows])
        return (features @ self.weights).log_softmax(-1).flatten()

    @torch.no_grad()
    def rating(self, features: torch.Tensor) -> torch.Tensor:
        return (features @ self.weights).softmax(-1) @ torch.arange(1.0, 6.0)


@pytest.mark.long
def test_a_judge_rates_better_than_it_did():
    """On answers that it has not read; planted quality is a mean of three features, its labels are noisy."""
    rng = torch.Generator().manual_seed(0)
    features = torch.rand(300, 8, generator=rng)
    features[:, 7] = 1.0
    planted = 1 + 4 * features[:, :3].mean(1)
    noisy = (planted + 0.3 * torch.randn(300, generator=rng)).clamp(1, 5)
    near = (-(torch.arange(1.0, 6.0) - noisy[:, None]).square()).softmax(-1)
    rows = []
    for place in range(200):
        row = {"id": str(place), "prompt": [0], "completions": [[k] for k in range(3, 8)]}
        columns = {"scores": [1.0, 2.0, 3.0, 4.0, 5.0], "features": features[place].tolist()}
        row |= {**columns, "quality": float(noisy[place]), "reference_ratings": near[place].tolist()}
        rows.append(row)
    judge, objective = Judge(), build("objective", "self_judge")
    before = pearsonr(judge.rating(features[200:]), planted[200:]).statistic
    adam, batch = torch.optim.Adam(judge.parameters(), lr=0.1), batch_of(rows)
    for _ in range(400):
        adam.zero_grad()
        objective.loss(SimpleNamespace(policy=judge), batch).mean().backward()
        adam.step()
    after = pearsonr(judge.rating(features[200:]), planted[200:]).statistic
    assert after > 0.9 and after > before + 0.2
