"""Co-kriging: what runs cut short tell of whole ones, and a search that pays for both."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from helpers.search import MIXED, PLANE, play
from luthier.clock import Clock
from luthier.methods.searchers._base import Dim, Observation, Space
from luthier.methods.searchers.model_based import _acquire
from luthier.methods.searchers.model_based._surrogates import fit
from luthier.methods.searchers.model_based.cokriging import levels as _levels
from luthier.methods.searchers.model_based.cokriging.levels import Joint, Ladder, joint, on
from luthier.registry import build
from luthier.study.goals import parse_goals
from luthier.study.search import Measurement, TrialStore, optimize

pytest.importorskip("optuna")


LINE = Space((Dim("x"),))


EXACT = {"deterministic_objective": True}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """Fewer than by default: what is found of them is found of more as well."""
    monkeypatch.setattr(_acquire, "POOL", 100)


def whole(x):
    """Forrester's function."""
    return (6 * x - 2) ** 2 * np.sin(12 * x - 4)


def brief(x):
    return 0.5 * whole(x) + 10 * (x - 0.5) - 5


LEAST = whole(np.linspace(0, 1, 100_001)).min()


def known(low, high):
    """Points of both levels, and their values."""
    return np.vstack([on(0, low), on(1, high)]), np.concatenate([brief(low[:, 0]), whole(high[:, 0])])


def cost(spec, seed, most=15.0):
    """What was paid, in full runs, until one came within 1e-2 of the optimum. No configuration is paid for
    twice.
    """
    searcher, seen, paid = build("searcher", spec), [], {}
    while sum(paid.values()) < most:
        asked = searcher.ask(LINE, seen, 1, Clock(seed))
        number = max(paid, default=-1) + 1 if asked.number is None else asked.number
        assert asked.share > paid.get(number, 0.0)
        assert asked.number is None or seen[[s.number for s in seen].index(number)].point == asked.point
        paid[number], x = asked.share, LINE.encode(asked.point)[0]
        seen.append(
            Observation(
                number, asked.point, (float(whole(x) if asked.share == 1 else brief(x)),), asked.share
            )
        )
        if asked.share == 1 and seen[-1].values[0] - LEAST < 1e-2:
            break
    return sum(paid.values())


def test_brief_runs_tell_of_whole_ones():
    """Ten brief and four whole values of Forrester's function, against a process that knows the four
    alone.
    """
    low, high, grid = (
        np.linspace(0, 1, 10)[:, None],
        np.array([[0.0], [0.4], [0.6], [1.0]]),
        np.linspace(0, 1, 101)[:, None],
    )
    both, alone = joint(*known(low, high), 2, 0.0), fit(high, whole(high[:, 0]), noise=0.0)
    off = lambda mean: np.sqrt(np.mean((mean - whole(grid[:, 0])) ** 2))
    assert off(both.at(on(1, grid))[0]) < 0.6 * off(alone.at(grid)[0])
    X, y = known(low, high)
    assert both.at(X)[0] == pytest.approx(y, abs=1e-4)


def test_the_joint_covariance_is_that_of_the_recursion():
    """f_2 = rho_1 (rho_0 g_0 + g_1) + g_2, drawn many times."""
    process = Ladder(np.array([[0.3], [0.5], [0.2]]), np.array([1.0, 0.5, 0.2]), np.array([0.8, 1.5]), 0.0)
    X = np.linspace(0, 1, 4)[:, None]
    rng, g = np.random.default_rng(0), []
    for u in range(3):
        alone = Ladder(process.scales[u : u + 1], process.variance[u : u + 1], np.empty(0), 0.0)
        g.append(rng.standard_normal((200_000, 4)) @ np.linalg.cholesky(alone.kernel(on(0, X), on(0, X))).T)
    f = [g[0], 0.8 * g[0] + g[1], 1.5 * (0.8 * g[0] + g[1]) + g[2]]
    for s in range(3):
        for t in range(3):
            assert np.abs(f[s].T @ f[t] / 200_000 - process.kernel(on(s, X), on(t, X))).max() < 0.03
    model = Joint(process, np.vstack([on(0, X), on(2, X[:2])]), np.arange(6.0))
    Z = np.array([[0.15], [0.7]])
    assert model.along(Z, 1) == pytest.approx(np.diag(model.covariance(on(1, Z), on(2, Z))))
    assert model.along(Z, 2) == pytest.approx(model.at(on(2, Z))[1])


@pytest.mark.parametrize("noise", [0.01, None])
def test_it_is_fitted_by_the_gradient_of_its_loss(monkeypatch, noise):
    """Three levels, two settings, by differences."""
    kept, rng = [], np.random.default_rng(0)
    lowest = _levels.lowest
    monkeypatch.setattr(_levels, "lowest", lambda loss, *more: kept.append(loss) or lowest(loss, *more))
    X = np.column_stack([rng.random((12, 2)), np.repeat([0, 1, 2], 4)])
    joint(X, np.sin(5 * X[:, 0]) * (1 + X[:, 2]) + X[:, 1], 3, noise)
    for _ in range(3):
        theta = np.concatenate(
            [rng.normal(0, 0.5, 9), rng.normal(1, 0.5, 2), *([[-3.0]] if noise is None else [])]
        )
        loss, grad = kept[0](theta)
        assert (
            check_grad(lambda t: kept[0](t)[0], lambda t: kept[0](t)[1], theta) < 1e-4 * np.linalg.norm(grad)
            and loss < 1e9
        )


def test_of_one_level_it_is_the_process_of_one():
    rng = np.random.default_rng(0)
    X, Z = rng.random((10, 2)), rng.random((5, 2))
    y = np.sin(5 * X[:, 0]) + X[:, 1]
    one, same = fit(X, y), joint(on(0, X), y, 1)
    for a, b in zip(one.at(Z), same.at(on(0, Z))):
        assert b == pytest.approx(a, rel=1e-3)


def test_a_measurement_of_the_end_tells_most():
    x = np.linspace(0, 1, 6)[:, None]
    tells = build("searcher", "cokriging").tells(
        joint(*known(x, x[::3]), 2, 0.0), np.array([[0.1], [0.5], [0.9]])
    )
    assert tells[:, 1] == pytest.approx(1, abs=1e-4) and (tells[:, 0] < 0.999).all() and (tells >= 0).all()


@pytest.mark.slow
@pytest.mark.long
def test_it_pays_less_for_the_optimum():
    """A tenth of the steps as the brief run: to Forrester's optimum within 1e-2, ten seeds, against whole
    runs alone.
    """
    both = [cost({"name": "cokriging", "eta": 10, "min_share": 0.1, **EXACT}, seed) for seed in range(10)]
    alone = [cost({"name": "bayes", **EXACT}, seed) for seed in range(10)]
    assert np.median(both) < np.median(alone) - 1, (both, alone)


@pytest.mark.long
@pytest.mark.parametrize("several", [1, 2])
def test_it_goes_on_with_what_was_paused(several):
    """On a conditional space, three shares, one goal by knowledge gradients or two by volume: shares grow,
    whole runs come.
    """
    bowl = lambda u: (float(((u - 0.3) ** 2).sum()), float(((u - 0.7) ** 2).sum()))[:several]
    spec = {"name": "cokriging", "n_startup_trials": 5, "acquisition": "knowledge_gradient", **EXACT}
    seen = play(spec, bowl, 3.4, space=MIXED, wanted=several)
    assert {round(9 * s.share) for s in seen} == {1, 3, 9} and all(
        MIXED.active(s.point) == dict(s.point) for s in seen
    )
    runs: dict[int, list[float]] = {}
    for s in seen:
        runs.setdefault(s.number, []).append(s.share)
    assert all(r == sorted(set(r)) for r in runs.values()) and any(len(r) > 1 for r in runs.values())
    again = play(spec, bowl, 3.4, space=MIXED, wanted=several, seen=seen[:-2])
    assert [(s.point, s.share) for s in again] == [(s.point, s.share) for s in seen]


@pytest.mark.long
def test_of_one_share_it_is_a_search_of_whole_runs():
    seen = play(
        {"name": "cokriging", "min_share": 1.0, **EXACT},
        lambda u: (float(((u - 0.4) ** 2).sum()),),
        18,
        space=PLANE,
        wanted=1,
    )
    assert (
        all(s.share == 1 for s in seen)
        and min(s.values[0] for s in seen[10:]) < min(s.values[0] for s in seen[:10]) / 4
    )


@pytest.mark.long
def test_the_book_of_a_search_goes_on_with_paused_runs():
    """What goes on keeps its number, and only the difference is paid; a search that stopped goes on as if it
    had not.
    """

    def search(trials, book):
        at = lambda t: (t.user_attrs["point"]["x"], t.user_attrs["share"])
        measure = lambda t, i: Measurement(
            {0: {"loss": float(whole(at(t)[0]) if at(t)[1] == 1 else brief(at(t)[0]))}}
        )
        return [
            (t.observation.number, t.observation.share, t.observation.point)
            for t in optimize(book, build("searcher", spec), measure, trials)
        ]

    spec = {"name": "cokriging", "eta": 4, "min_share": 0.25, **EXACT}
    book, again = (TrialStore(LINE, parse_goals(["loss"], "loss"), (), None, "s") for _ in range(2))
    tried = search(4.5, book)
    assert [s for _, s, _ in tried[:6]] == [0.25] * 4 + [1, 1] and {n for n, _, _ in tried[4:6]} <= {
        n for n, _, _ in tried[:4]
    }
    far = {n: (share, x) for n, share, x in tried}  # of each number the last
    assert all(x == far[n][1] for n, _, x in tried) and 4 < sum(share for share, _ in far.values()) <= 4.5
    assert search(3, again) == tried[: len(again.finished())] and search(4.5, again) == tried
