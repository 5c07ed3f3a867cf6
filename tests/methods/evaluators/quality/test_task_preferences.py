"""task_preferences: a preference for one task, samples in the box, and the weighted accuracy by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.models import make_llama
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators.first_order._posterior import Posterior
from luthier.methods.evaluators.quality import task_preferences
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.policy import Policy
from luthier.registry import build

ROWS = [
    {"id": f"{name}{k}", "prompt": f"say {k}{name} ", "completions": ["ab"[k % 2]], "source": name}
    for name in "xy"
    for k in range(8)
]


@pytest.fixture
def stored(roles, monkeypatch):
    """A policy, and the posteriors of two tasks."""
    net: Any = make_llama(seed=1, tie_word_embeddings=False)
    attached = TunedWeights(build("tuner", "full"), net, lambda name, p: True)
    cast = copy.copy(roles)
    cast.policy = Policy(Causal(), net, attached)
    start, posteriors = attached.tensors(), {}
    for k, name in enumerate("xy"):
        rng = torch.Generator().manual_seed(k)
        mean = {n: t.double() + 0.1 * torch.randn(t.shape, generator=rng) for n, t in start.items()}
        posteriors[name] = Posterior(mean, {n: torch.full(t.shape, 0.02).double() for n, t in start.items()})
    monkeypatch.setattr(task_preferences, "posterior_of", lambda folder: posteriors.get(folder))
    return cast, posteriors


def evaluator(**settings) -> Any:
    return build("evaluator", {"name": "task_preferences", "posteriors": {n: [n] for n in "xy"}, **settings})


@torch.no_grad()
def test_one_task_alone_is_its_posterior(stored, tmp_path):
    roles, posteriors = stored
    one = evaluator(preferences=[[1, 0], [0, 1], [0.25, 0.75]])
    for weights, name in (([1, 0], "x"), ([0, 1], "y")):
        mean = one.posterior(weights).mean
        assert all(torch.equal(mean[n], t) for n, t in posteriors[name].mean.items())
    alone = {name: one.accuracies(roles, ROWS, posteriors[name].mean) for name in "xy"}
    metrics = one.run(roles, ROWS, tmp_path, "after")
    assert metrics["preference_accuracy/1.00,0.00"] == alone["x"][0]
    assert metrics["preference_accuracy/0.00,1.00"] == alone["y"][1]
    half = one.posterior([0.5, 0.5]).mean
    first = next(iter(half))
    by_hand = (posteriors["x"].mean[first] + posteriors["y"].mean[first]) / 2
    assert torch.allclose(half[first], by_hand, atol=1e-12)
    equal = one.accuracies(roles, ROWS, half)
    pairs = [(1, 0), (0, 1), (0.25, 0.75)]
    expected = sum(v * equal[0] + w * equal[1] for v, w in pairs) / 3
    assert metrics["equal_accuracy"] == pytest.approx(expected)
    assert one.run(roles, ROWS, tmp_path, "before") == {}


@torch.no_grad()
def test_samples_lie_in_the_box(stored):
    roles, _ = stored
    one = evaluator(samples=3, alpha=0.05)
    posterior = one.posterior([0.5, 0.5])
    models = list(one.models(roles, [0.5, 0.5], 0))
    name = next(iter(posterior.mean))
    assert len(models) == 3 and not torch.equal(models[0][name], models[1][name])
    distances = torch.cat([((m[n] - t) / 0.02).flatten() for m in models for n, t in posterior.mean.items()])
    assert 1.94 < float(distances.abs().max()) <= 1.96 and abs(float(distances.mean())) < 0.05
    again = list(one.models(roles, [0.5, 0.5], 0))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(models, again, strict=True) for n in a)


def test_wrong_preferences_are_refused():
    for weights, match in (([[1.0]], "1 weights for 2 tasks"), ([[0.5, 0.6]], "sum to 1")):
        with pytest.raises(RecipeError, match=match):
            evaluator(preferences=weights)


def test_a_task_without_held_out_rows_is_told(stored, tmp_path):
    roles, _ = stored
    warnings = []
    roles.warn = warnings.append
    assert evaluator().run(roles, [row for row in ROWS if row["source"] == "x"], tmp_path, "after") == {}
    assert len(warnings) == 1 and "no held-out row is of task y" in warnings[0]
