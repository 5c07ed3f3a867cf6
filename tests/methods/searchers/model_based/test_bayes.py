"""Bayesian searchers: what a Gaussian process believes, what acquisitions promise, and what a search finds by
them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.search import MIXED, play
from luthier.clock import Clock
from luthier.methods.searchers._base import Dim, Observation, Space, Suggestion
from luthier.methods.searchers.model_based import _acquire
from luthier.methods.searchers.model_based._surrogates import Process, Surrogate, fit
from luthier.registry import build
from luthier.study.statistics import hypervolume

pytest.importorskip("optuna")


SQUARE = Space((Dim("a"), Dim("b")))


SOME = np.random.default_rng(0)


X, Z = SOME.random((12, 2)), SOME.random((7, 2))


Y = np.sin(6 * X[:, 0]) + X[:, 1] ** 2


def prior(noise: float) -> Process:
    return Process(np.array([0.3, 0.8]), 1.3, noise)


def branin(u):
    """Above its minimum."""
    x, y = 15 * u[0] - 5, 15 * u[1]
    bowl = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    return (bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887,)


def dtlz2(u):
    g = float(((u[2:] - 0.5) ** 2).sum())
    a, b = u[:2] * math.pi / 2
    return tuple((1 + g) * v for v in (math.cos(a) * math.cos(b), math.cos(a) * math.sin(b), math.sin(a)))


def test_a_posterior_is_the_formula():
    """By an inverse; with scikit-learn's, where it is there: of values that are standardised already, around
    their mean.
    """
    y = (Y - Y.mean()) / Y.std()
    found = Surrogate(prior(0.04), X, y)
    k = lambda A, B: prior(0.04).kernel(A, B)
    inverse = np.linalg.inv(k(X, X) + 0.04 * np.eye(12))
    mean, variance = found.at(Z)
    mu = found.mean
    assert mean == pytest.approx(mu + k(Z, X) @ inverse @ (y - mu))
    assert variance == pytest.approx(1.3 - np.einsum("ij,jk,ik->i", k(Z, X), inverse, k(Z, X)))
    assert np.diag(found.covariance(Z, Z)) == pytest.approx(variance)
    gp = pytest.importorskip("sklearn.gaussian_process")
    theirs = gp.GaussianProcessRegressor(
        1.3 * gp.kernels.Matern([0.3, 0.8], nu=2.5), alpha=0.04, optimizer=None
    ).fit(X, y - mu)
    their_mean, their_sd = theirs.predict(Z, return_std=True)
    assert mean == pytest.approx(mu + their_mean) and variance == pytest.approx(their_sd**2)


def test_values_without_noise_are_met():
    found = fit(X, 100 * Y + 7, noise=0.0)
    mean, variance = found.at(X)
    assert np.abs(mean - (100 * Y + 7)).max() < 1e-6 * np.std(100 * Y) and variance.max() < 1e-4
    between, spread = found.at(Z)
    off = np.abs(between - (100 * (np.sin(6 * Z[:, 0]) + Z[:, 1] ** 2) + 7))
    assert np.median(off) < 0.1 * np.std(100 * Y) and (off < 3 * np.sqrt(spread)).all(), (
        "near between, and as far off as it says"
    )
    assert found.at(np.array([[99.0, 99.0]]))[1] > 2 * spread.max()


def test_what_does_not_count_gets_a_long_scale_and_noise_is_found():
    rng = np.random.default_rng(1)
    wide = rng.random((40, 6))
    y = np.sin(5 * wide[:, 2]) + 0.1 * rng.standard_normal(40)
    for sparse in (0.0, 0.1):
        found = fit(wide, y, sparse=sparse)
        scales = found.process.scales
        assert scales.argmin() == 2 and np.median(np.delete(scales, 2)) > 3 * scales[2]
        assert 0.05**2 < found.noise < 0.2**2


def test_the_improvement_in_closed_form_is_what_sampling_says():
    z = np.random.default_rng(0).standard_normal(1_000_000)
    for mean, sd, best in ((0.0, 1.0, 0.0), (0.5, 0.3, 0.2), (-1.0, 0.1, 0.0), (3.0, 2.0, 0.0)):
        sampled = np.maximum(best - (mean + sd * z), 0).mean()
        assert _acquire.improvement(np.array([mean]), np.array([sd]), best)[0] == pytest.approx(
            sampled, abs=3e-3 * sd
        )
    assert _acquire.improvement(np.array([1.0, -1.0]), np.zeros(2), 0.0) == pytest.approx([0, 1])


def test_the_improvement_of_noisy_values_is_the_closed_form_without_noise():
    for noise, same in ((0.0, True), (0.1, False)):
        model = Surrogate(prior(noise), X[:5], Y[:5])
        mean, variance = model.at(Z)
        simulated = _acquire.gain(model, X[:5], Z, _acquire.normals(20_000))
        closed = _acquire.improvement(mean, np.sqrt(variance), float(Y[:5].min()))
        assert closed.max() > 1e-2 and np.allclose(simulated, closed, atol=2e-5) is same


@pytest.mark.parametrize("itself", [True, False])
def test_a_gain_is_what_measuring_and_fitting_anew_would_bring(itself):
    """Imagine a value at each candidate, compute the posterior again, and look at the best mean."""
    model = Surrogate(prior(0.05), X, Y)
    z, (shift, spread), among = _acquire.normals(9), (model.shift, model.spread), SOME.random((5, 2))
    found = _acquire.gain(model, among, Z, z, itself)
    mu, k = model.mean, lambda A, B: model.process.kernel(A, B)
    for i, x in enumerate(Z):
        mean, variance = (v[0] for v in model.at(x[None]))
        more, at = np.vstack([X, x]), np.vstack([among, x]) if itself else among
        best = []
        for value in mean + np.sqrt(variance + model.noise) * z:
            rest = (np.append(Y, value) - shift) / spread - mu
            best.append((mu + k(at, more) @ np.linalg.solve(k(more, more) + 0.05 * np.eye(13), rest)).min())
        assert found[i] == pytest.approx(model.at(among)[0].min() - shift - spread * np.mean(best), abs=1e-6)


def test_volumes_along_directions_are_volumes():
    rng = np.random.default_rng(0)
    for goals, corner in ((2, math.pi / 4), (3, math.pi / 6)):
        front, new, worst = rng.random((1, 8, goals)), rng.random((1, 5, goals)) / 2, np.ones(goals)
        along = _acquire.directions(rng, goals, 40_000)
        before = hypervolume(front[0], worst)
        assert corner * (_acquire.reach(front[0], worst, along).max(0) ** goals).mean() == pytest.approx(
            before, rel=0.02
        )
        added = corner * _acquire.improvement_of_volume(front, new, worst, along)
        assert added == pytest.approx([hypervolume([*front[0], c], worst) - before for c in new[0]], abs=0.01)


@pytest.mark.long
def test_it_finds_a_minimum_that_chance_does_not():
    """Branin, 30 evaluations, ten seeds."""
    found, drawn = [], []
    for seed in range(10):
        searcher, seen = build("searcher", {"name": "bayes", "deterministic_objective": True}), []
        while len(seen) < 30 and min((s.values[0] for s in seen), default=9) > 0.1:
            asked = searcher.ask(SQUARE, seen, 1, Clock(seed))
            seen.append(Observation(len(seen), asked.point, branin(SQUARE.encode(asked.point))))
        found.append(min(s.values[0] for s in seen))
        drawn.append(min(s.values[0] for s in play("random", branin, 30, seed, SQUARE, 1)))
    assert np.median(found) < 0.1 < np.median(drawn)


@pytest.mark.long
@pytest.mark.parametrize("acquisition", ["improvement", "knowledge_gradient"])
def test_noise_does_not_mislead_it(acquisition):
    """Told the better of what was measured, one is told the luckier; the best mean lies near the minimum."""
    rng = np.random.default_rng(0)
    bowl = lambda u: float(((u - 0.7) ** 2).sum())
    seen = play(
        {"name": "bayes", "acquisition": acquisition},
        lambda u: (bowl(u) + 0.03 * rng.standard_normal(),),
        20,
        0,
        SQUARE,
        1,
    )
    at = np.array([SQUARE.encode(s.point) for s in seen])
    best = at[fit(at, np.array([s.values[0] for s in seen])).at(at)[0].argmin()]
    assert (
        bowl(best) < 0.02 and np.median([bowl(u) for u in at[6:]]) < np.median([bowl(u) for u in at[:6]]) / 2
    )


@pytest.mark.parametrize(
    "pool, ours, chance",
    [
        pytest.param(100, 20, 22, marks=pytest.mark.long),
        pytest.param(_acquire.POOL, 16, 18, marks=pytest.mark.slow, id="as it searches"),
    ],
)
def test_three_goals_at_once(monkeypatch, pool, ours, chance):
    """DTLZ2: the volume of the front, against that of more evaluations by chance, ten seeds."""
    monkeypatch.setattr(_acquire, "POOL", pool)
    five = Space(tuple(Dim(f"x{i}") for i in range(5)))
    spec = {"name": "bayes", "deterministic_objective": True, "n_startup_trials": 8}
    cover = lambda seen: hypervolume([s.values for s in seen], (1.5,) * 3)
    won = [
        cover(play(spec, dtlz2, ours, seed, five, 3)) - cover(play("random", dtlz2, chance, seed, five, 3))
        for seed in range(10)
    ]
    assert np.mean(won) > 0.1 and sum(w > 0 for w in won) >= 8, won


@pytest.mark.long
def test_settings_that_count_only_sometimes_and_choices():
    """The best tuner and its setting are found in a space where another tuner has settings of its own."""

    def f(point):
        good = abs(math.log(point["a.r"] / 32)) if point["tuner"] == "a" else 1.5 + point["b.width"]
        return good + abs(math.log10(point["rate"]) + 3) + (not point["on"])

    searcher, seen = build("searcher", {"name": "bayes", "deterministic_objective": True}), []
    for i in range(35):
        asked = searcher.ask(MIXED, seen, 1, Clock(0))
        assert MIXED.active(asked.point) == asked.point
        seen.append(Observation(i, asked.point, (f(asked.point),)))
    best = min(seen, key=lambda s: s.values[0])
    assert best.values[0] < 0.3 and best.point["tuner"] == "a" and best.point["on"] is True
    assert len({tuple(s.point.items()) for s in seen}) == 35, "what was measured is not measured again"


@pytest.mark.long
def test_limits_are_kept_to():
    """The goal pulls into the half of a square that is forbidden."""
    outside = []
    for known in (0.0, 1.0):
        seen: list[Observation] = []
        for i in range(20):
            asked: Suggestion = build("searcher", "bayes").ask(SQUARE, seen, 1, Clock(0))
            a, b = asked.point["a"], asked.point["b"]
            seen.append(Observation(i, asked.point, (a + b,), violation=known * max(0.0, 0.5 - a)))
        outside.append(sum(max(0.0, 0.5 - s.point["a"]) for s in seen[6:]))
    assert outside[1] < 0.3 * outside[0]
    assert min(s.values[0] for s in seen if s.violation == 0) < 0.6, "and the best at the edge is found"
