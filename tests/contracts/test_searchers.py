"""The contract that every searcher keeps, and what each finds on known fronts."""

from __future__ import annotations

import json
import math
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

from helpers.search import MIXED, PLANE, play
from luthier.clock import Clock
from luthier.methods.searchers._base import (
    Dim,
    Observation,
    Space,
    best_first,
    crowding,
    pareto_ranks,
)
from luthier.methods.searchers.bandit._brackets import cost, halving
from luthier.methods.searchers.model_based import _acquire
from luthier.registry import build, names
from luthier.study.statistics import hypervolume

pytest.importorskip("optuna")


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """BoTorch compiles a kernel for several goals at first use, which takes longer than all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("botorch"):
            logei = import_module("botorch.acquisition.multi_objective.logei")
            patch.setattr(logei, "_load_attempted", True, raising=False)
        yield


def zdt1(x):
    g = 1 + 9 * np.mean(x[1:])
    return float(x[0]), float(g * (1 - math.sqrt(x[0] / g)))


def zdt2(x):
    g = 1 + 9 * np.mean(x[1:])
    return float(x[0]), float(g * (1 - (x[0] / g) ** 2))


QUICK = {  # whose models wait long or cost much by default
    "bayes": {"n_startup_trials": 4},
    "botorch": {"n_startup_trials": 7, "prior": "plain", "candidates": 64, "climbs": 1, "samples": 16},
    "cokriging": {"n_startup_trials": 4},
    "tpe": {"n_startup_trials": 4},
}


@pytest.mark.parametrize("name", names("searcher"))
def test_a_searcher_is_a_function_of_what_was_seen(name, monkeypatch):
    """Legal points on a conditional space, JSON in its marks, the same answer to the same history, another to
    another seed.
    """
    monkeypatch.setattr(_acquire, "POOL", 40)
    spec = {"name": name, **QUICK.get(name, {})}
    most = 12 if name == "cokriging" else None
    f = lambda u: (float(((u - 0.3) ** 2).sum()), float(((u - 0.7) ** 2).sum()))
    seen = play(spec, f, 8, space=MIXED, most=most)
    for s in seen:
        assert MIXED.active(s.point) == dict(s.point) and 0 < s.share <= 1
        assert all(d.has(s.point[d.name]) for d in MIXED.dims if d.name in s.point)
        assert ("a.r" in s.point) == (s.point["tuner"] == "a") and json.loads(json.dumps(s.marks)) == s.marks
    again = play(spec, f, 8, space=MIXED, seen=seen[:5], most=most)
    assert [s.point for s in again] == [s.point for s in seen], "stopped in between, it asks the same"
    assert [s.point for s in play(spec, f, 8, seed=1, space=MIXED, most=most)] != [s.point for s in seen]
    broken = [*seen, Observation(99, MIXED.start(), (math.inf, math.inf))]
    assert MIXED.active(build("searcher", spec).ask(MIXED, broken, 2, Clock(0)).point)


@pytest.mark.parametrize("name", ["tpe", "hyperband"])
def test_it_beats_random_search_on_known_fronts(name):
    """Hypervolume at equal budget, in full runs, ten seeds each."""
    for f, trials in ((zdt1, 25), (zdt2, 25)):
        cover = lambda seen: hypervolume([s.values for s in seen if s.share == 1], (1.1, 6.0))
        won = [
            cover(play(name, f, trials, seed)) - cover(play("random", f, trials, seed)) for seed in range(10)
        ]
        assert np.mean(won) > 0 and sum(w > 0 for w in won) >= 8, (f.__name__, won)


def test_constraints_are_kept_to():
    """The goal pulls into the half of a square that is forbidden: a search that knows of it asks there far
    less.
    """
    asked_there = []
    for known in (0.0, 1.0):
        space, seen = Space((Dim("x"), Dim("y"))), []
        for i in range(40):
            asked = build("searcher", "tpe").ask(space, seen, 1, Clock(0))
            x, y = asked.point["x"], asked.point["y"]
            seen.append(
                Observation(i, asked.point, (x + y,), violation=known * max(0.0, 0.5 - x), marks=asked.marks)
            )
        asked_there.append(sum(s.point["x"] < 0.5 for s in seen[20:]))
    assert asked_there[1] < 0.6 * asked_there[0] and best_first(seen)[0].violation == 0


@pytest.mark.parametrize("prior", ["saas", "plain"])
def test_improvement_expected_of_processes_covers_more_than_chance_and_keeps_to_limits(prior):
    """Few configurations; then one goal that pulls over a limit."""
    pytest.importorskip("botorch")
    quick = {"name": "botorch", "prior": prior, "candidates": 128, "climbs": 1, "samples": 16}
    cover = lambda name: hypervolume([s.values for s in play(name, zdt1, 14, 0)], (1.1, 6.0))
    assert cover(quick) > cover("random") + 0.5
    space, seen = Space((Dim("x"), Dim("y"))), []
    for i in range(10):
        asked = build("searcher", quick).ask(space, seen, 1, Clock(0))
        x, y = asked.point["x"], asked.point["y"]
        seen.append(Observation(i, asked.point, (x + y,), violation=max(0.0, 0.5 - x), marks=asked.marks))
    top = best_first(seen)[0]
    assert top.violation == 0 and top.values[0] < 0.75 and top.number >= 6, (
        "the best within the limit is 0.5, at an edge of it"
    )


def test_halving_pays_what_the_formula_says():
    assert halving(9, 1 / 9, 3) == [(9, pytest.approx(1 / 9)), (3, pytest.approx(1 / 3)), (1, 1.0)]
    for n, k, eta in ((27, 3, 3), (16, 4, 2), (9, 2, 3)):
        rungs = halving(n, eta**-k, eta)
        assert cost(rungs, anew=True) == pytest.approx(
            sum(math.floor(n / eta**i) * eta ** (i - k) for i in range(k + 1))
        )
        assert cost(rungs, anew=True) == pytest.approx((k + 1) * n / eta**k)  # every rung costs the same
    band = build("searcher", {"name": "hyperband", "inner": "random"})
    assert [band.bracket(i)[0][0] for i in range(4)] == [9, 5, 3, 9] and band.shares == pytest.approx(
        (1 / 9, 1 / 3, 1)
    )
    seen = play({"name": "halving", "n": 9}, zdt1, cost(halving(9, 1 / 9, 3)))
    assert [round(9 * s.share) for s in seen] == [1] * 9 + [3] * 3 + [9]
    assert len({s.number for s in seen}) == 9, "survivors go on, they are not begun anew"
    first = best_first(seen[:9])
    assert {s.number for s in seen[9:12]} == {s.number for s in first[:3]}


def test_dehb_of_one_share_and_no_crossover_is_the_mutation_alone():
    spec = {"name": "dehb", "min_share": 1.0, "crossover": 0.0, "population": 6}
    seen = play(spec, lambda u: (float(((u - 0.4) ** 2).sum()),), 60, wanted=1)
    by, moved = {s.number: s for s in seen}, 0
    for s in (s for s in seen if "of" in s.marks):
        a, b, c = (PLANE.encode(by[i].point) for i in s.marks["of"])
        mutant = a + 0.5 * (b - c)
        inside = (mutant >= 0) & (mutant <= 1)
        assert np.allclose(PLANE.encode(s.point)[inside], mutant[inside])
        moved += int(inside.sum())
    assert moved > 100
    assert min(s.values[0] for s in seen) < min(
        s.values[0] for s in play("random", lambda u: (float(((u - 0.4) ** 2).sum()),), 60, wanted=1)
    )
    kept = play({**spec, "crossover": 1.0}, zdt1, 20)
    child = next(s for s in kept if "of" in s.marks)
    parents = [
        PLANE.encode(s.point)
        for s in kept
        if s.marks["slot"] == child.marks["slot"] and s.number < child.number
    ]
    assert any((np.isclose(PLANE.encode(child.point), p)).sum() == 3 for p in parents), (
        "all but one setting stay the parent's"
    )


def test_layers_are_those_of_brute_force():
    values = np.random.default_rng(0).random((60, 3)).round(1)

    def beats(a, b):
        return (a <= b).all() and (a < b).any()

    left, level = set(range(60)), 0
    found = pareto_ranks(values)
    while left:
        now = {i for i in left if not any(beats(values[j], values[i]) for j in left)}
        assert all(found[i] == level for i in now)
        left, level = left - now, level + 1
    assert np.isinf(crowding(values[:, :1])).sum() == 2
