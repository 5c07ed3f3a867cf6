"""Searches: what a searcher asks, what a search goes over, refuses, goes on with after a stop, and says of
what it found.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna")

import luthier
from conftest import PAIRS, SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.plans.studies.front import expected_utility, sparsity
from luthier.methods.searchers._base import (
    Dim,
    Observation,
    Space,
    Suggestion,
    best_first,
    crowding,
    pareto_ranks,
)
from luthier.methods.searchers.bandit._brackets import cost, halving
from luthier.recipe.recipe import Recipe
from luthier.registry import build, names
from luthier.study import search as searching
from luthier.study.goals import beyond_worst, front_figure, parse_goals, parse_limits
from luthier.study.search import Measurement, TrialStore, optimize, parse_seeds, search_spec
from luthier.study.space import only_layers, parse_space
from luthier.study.statistics import hypervolume

PLANE = Space(tuple(Dim(f"x{i}") for i in range(4)))
MIXED = Space(
    (
        Dim("tuner", choices=("a", "b")),
        Dim("rate", 1e-5, 1e-1, log=True),
        Dim("a.r", 4, 64, log=True, whole=True, when=("tuner", "a")),
        Dim("b.width", 0.0, 1.0, when=("tuner", "b")),
        Dim("on", choices=(True, False)),
    )
)


def zdt1(x):
    g = 1 + 9 * np.mean(x[1:])
    return float(x[0]), float(g * (1 - math.sqrt(x[0] / g)))


def zdt2(x):
    g = 1 + 9 * np.mean(x[1:])
    return float(x[0]), float(g * (1 - (x[0] / g) ** 2))


def play(spec, f, trials, seed=0, space=PLANE, wanted=2, seen=None):
    """Ask and answer without anything around it: what was seen, at equal budgets in full runs."""
    searcher, seen = build("searcher", spec), list(seen or [])
    paid: dict[int, float] = {}
    for s in seen:
        paid[s.number] = max(s.share, paid.get(s.number, 0))
    while sum(paid.values()) < trials - 1e-9:
        asked = searcher.ask(space, seen, wanted, Clock(seed))
        number = max(paid, default=-1) + 1 if asked.number is None else asked.number
        paid[number] = max(asked.share, paid.get(number, 0.0))
        values = f(space.encode(asked.point))
        seen.append(
            Observation(
                number,
                asked.point,
                tuple(v + 0.2 * (1 - asked.share) for v in values),
                asked.share,
                0.0,
                asked.marks,
            )
        )
    return seen


# ---------------------------------------------------------------------------------------------- searchers


@pytest.mark.parametrize("name", names("searcher"))
def test_a_searcher_is_a_function_of_what_was_seen(name):
    """Legal points on a conditional space, JSON in its marks, the same answer to the same history, another to
    another seed.
    """
    f = lambda u: (float(((u - 0.3) ** 2).sum()), float(((u - 0.7) ** 2).sum()))
    seen = play(name, f, 8, space=MIXED)
    for s in seen:
        assert MIXED.active(s.point) == dict(s.point) and 0 < s.share <= 1
        assert all(d.has(s.point[d.name]) for d in MIXED.dims if d.name in s.point)
        assert ("a.r" in s.point) == (s.point["tuner"] == "a") and json.loads(json.dumps(s.marks)) == s.marks
    again = play(name, f, 8, space=MIXED, seen=seen[:5])
    assert [s.point for s in again] == [s.point for s in seen], "stopped in between, it asks the same"
    assert [s.point for s in play(name, f, 8, seed=1, space=MIXED)] != [s.point for s in seen]
    broken = [*seen, Observation(99, MIXED.start(), (math.inf, math.inf))]
    assert MIXED.active(build("searcher", name).ask(MIXED, broken, 2, Clock(0)).point)


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


def test_points_and_vectors_are_one():
    for u in np.random.default_rng(0).random((50, 5)):
        point = MIXED.decode(u)
        assert MIXED.decode(MIXED.encode(point)) == pytest.approx(point)
    assert MIXED.features(np.array([MIXED.encode(MIXED.start())])).shape == (1, 2 + 1 + 1 + 1 + 2)
    with pytest.raises(ValueError, match="not a range with a logarithm"):
        Dim("x", 0, 1, log=True)


# ---------------------------------------------------------------------------------------------- seeds and gaps


def bandit(seeds: int, trials: int = 40, seed: int = 0):
    """A search whose objective has an optimum of its own for each seed: score on tuning seeds, and on seeds
    never used.
    """
    book, best_at = (
        TrialStore(Space((Dim("x"),)), parse_goals(["loss"], "loss"), ()),
        lambda s: np.random.default_rng([seed, s]).uniform(0.2, 0.8),
    )
    f = lambda x, s: {"loss": (x - best_at(s)) ** 2}

    def measure(t, index):
        return Measurement({s: f(t.user_attrs["point"]["x"], s) for s in range(1000, 1000 + seeds)}, 1.0)

    top = searching.choose(optimize(book, build("searcher", "tpe"), measure, trials, seed=seed))[0]
    return float(np.mean([f(top.observation.point["x"], s)["loss"] for s in range(50)])) - top.goals["loss"]


def test_one_tuning_seed_flatters_and_five_flatter_less():
    one, five = (np.mean([bandit(n, 20, seed) for seed in range(5)]) for n in (1, 5))
    assert one > 0 and five < 0.7 * one


def test_seeds_that_overlap_are_refused(tiny):
    base = {"model": tiny, "data": SUMS, "max_steps": 2}
    with pytest.raises(RecipeError, match="seeds 2 stand under --seeds and under --test-seeds"):
        search_spec(base, seeds="1,2", test_seeds="2,3")
    made = search_spec(base)
    assert not set(made.seeds) & set(made.test_seeds) and made.test_seeds == (0, 1, 2)
    assert parse_seeds(3, 1000, "") == (1000, 1001, 1002) and parse_seeds("7,", 0, "") == (7,)
    for bad in ("x", "0", "1,1"):
        with pytest.raises(RecipeError, match="--seeds"):
            parse_seeds(bad, 0, "--seeds")


# ---------------------------------------------------------------------------------------------- goals


def test_goals_and_limits_are_understood():
    found = parse_goals(["quality, forgetting,parameters"], "accuracy")
    assert [(g.metric, g.up) for g in found] == [
        ("accuracy", True),
        ("retention_loss", False),
        ("trained", False),
    ]
    assert found[0].value({"accuracy": 0.5}) == -0.5 and found[0].value({}) == math.inf
    (limit,) = parse_limits(["memory <= 8GB"], "loss")
    assert limit.violation({"peak_memory_mb": 8192}) == 0 and limit.violation({"peak_memory_mb": 16384}) == 1
    assert [
        x.value for x in parse_limits(["time < 2h and accuracy >= 90%", "parameters <= 10k"], "loss")
    ] == [
        7200,
        0.9,
        10_000,
    ]
    for bad, said in (
        (["memory <= 8 cows"], "not measured in 'cows'"),
        (["memory"], "not a limit"),
        (["lossy < 1"], "did you mean 'loss'"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_limits(bad, "loss")
    for bad, said in (
        (["generated_tokens"], "neither more nor less"),
        (["loss,loss"], "twice"),
        (["front(loss)"], "behind an @"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_goals(bad, "loss")


def test_volumes_of_fronts_are_those_by_hand():
    """2-D and 3-D, and nothing changes where a point is added that others beat."""
    two, three = [(1, 3), (2, 2), (3, 1)], [(1, 2, 2), (2, 1, 2), (2, 2, 1)]
    assert hypervolume(two, (4, 4)) == 6 and hypervolume([*two, (3, 3)], (4, 4)) == 6
    assert hypervolume(three, (3, 3, 3)) == 4 and hypervolume([*three, (2, 2, 2)], (3, 3, 3)) == 4
    assert hypervolume([(0, 0, 0)], (1, 2, 3)) == 6 and hypervolume([(5, 0)], (4, 4)) == 0
    (goal,) = parse_goals(["front(accuracy, retention_loss @ 0, 4)"], "loss")
    assert goal.up and front_figure(
        goal, [{"accuracy": 0.5, "retention_loss": 2.0}, {"accuracy": 1.0, "retention_loss": 3.0}]
    ) == pytest.approx(1.5)
    (shares,) = parse_goals(["front(accuracy,retention_accuracy)"], "loss")
    assert shares.worst == (0.0, 0.0)


def test_a_search_over_fronts_finds_more_than_the_default():
    """A bandit of two rewards, tuned to a front per seed: the setting found covers more on seeds never used,
    in any order.
    """
    space = Space((Dim("temperature", 0.01, 10.0, log=True, default=10.0),))
    (goal,) = parse_goals(["front(generated_reward, accuracy @ 0, 0)"], "loss")

    def front_of(temperature, seed):
        rewards = np.random.default_rng(seed).random((8, 2)) ** 2
        acts = []
        for w in np.linspace(0, 1, 5):
            p = np.exp((rewards @ [w, 1 - w]) / temperature)
            acts.append(dict(zip(("generated_reward", "accuracy"), (p / p.sum()) @ rewards)))
        return {goal.metric: front_figure(goal, acts)}

    measure = lambda t, i: Measurement(
        {s: front_of(t.user_attrs["point"]["temperature"], s) for s in (1000, 1001, 1002)}
    )
    book = TrialStore(space, (goal,), ())
    tried = optimize(book, build("searcher", "tpe"), measure, 25)
    at = searching.choose(tried)[0].observation.point["temperature"]
    assert np.mean([front_of(at, s)[goal.metric] - front_of(10.0, s)[goal.metric] for s in range(20)]) > 0.05
    asked = [(Suggestion(dict(t.observation.point)), "earlier") for t in tried]
    for order in (asked[::-1], [asked[i] for i in np.random.default_rng(0).permutation(len(asked))]):
        again = optimize(
            TrialStore(space, (goal,), ()), build("searcher", "tpe"), measure, len(asked), first=order
        )
        assert searching.choose(again)[0].observation.point["temperature"] == at
    flat = lambda t, i: Measurement({1000: {goal.metric: 1.0}})  # all alike: still the same one
    ends = [
        searching.choose(
            optimize(TrialStore(space, (goal,), ()), build("searcher", "tpe"), flat, 25, first=o)
        )[0]
        for o in (asked, asked[::-1])
    ]
    assert ends[0].observation.point == ends[1].observation.point


def test_what_else_is_said_of_a_front():
    points = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.6)]
    assert expected_utility(points, [[1, 0], [0.5, 0.5], [0, 1]]) == pytest.approx((1 + 0.6 + 1) / 3)
    assert sparsity(points) == pytest.approx(2 * (0.6**2 + 0.4**2) / 2)
    assert sparsity([*points, (0.5, 0.5), points[0]]) == sparsity(points)
    assert sparsity(points[:1]) == math.inf
    utility, gaps = parse_goals(
        ["utility(accuracy, retention_loss), sparsity(accuracy, retention_loss)"], "loss"
    )
    acts = [{"accuracy": 1.0, "retention_loss": 2.0}, {"accuracy": 0.0, "retention_loss": 0.0}]
    by_hand = np.mean([max(w - 2 * (1 - w), 0) for w in np.linspace(0, 1, 21)])
    assert utility.up and utility.value({utility.metric: front_figure(utility, acts)}) == pytest.approx(
        -by_hand
    )
    assert (
        not gaps.up
        and front_figure(gaps, acts) == pytest.approx(1 + 4)
        and gaps.value({gaps.metric: front_figure(gaps, acts[:1])}) == math.inf
    )
    assert front_figure(gaps, [{"accuracy": 1.0}]) is None and math.isnan(
        front_figure(utility, [{"accuracy": math.nan, "retention_loss": 1.0}])
    )
    own = {"goal/short": 0.0, "reward_accuracy": 0.2}
    (volume,) = parse_goals(["hypervolume"], "loss", own)
    acts = [{"goal/short": 0.5, "reward_accuracy": 0.4}, {"goal/short": 0.25, "reward_accuracy": 0.6}]
    assert (
        front_figure(volume, acts) == pytest.approx(0.5 * 0.2 + 0.25 * 0.2)
        and volume.worst == (0.0, 0.2)
        and not beyond_worst(volume, acts)
    )
    assert "reward_accuracy 0.1 lies beyond 0.2" in beyond_worst(
        volume, [*acts, {"goal/short": 0.5, "reward_accuracy": 0.1}]
    )
    for said, plan, why in (
        ("utility", {}, "plan makes none"),
        ("hypervolume", {"goal/short": None}, "`worst` for short"),
        ("utility(loss @ 3)", {}, "only a hypervolume"),
    ):
        with pytest.raises(RecipeError, match=why):
            parse_goals([said], "loss", plan)


def test_differences_of_fronts_have_intervals():
    """Paired by test seed: t's interval by hand."""
    lines = [
        {"name": n, "test": {"utility": 0.0}, "by_seed": {"utility": v}}
        for n, v in (("recipe", [1.0, 2.0, 3.0]), ("found-1", [2.0, 3.1, 3.9]))
    ]
    searching.add_intervals(lines)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # of [1.0, 1.1, 0.9]
    d = lines[1]["beyond"]["utility"]
    assert (d["mean"], d["low"], d["high"]) == pytest.approx((1.0, 1.0 - half, 1.0 + half)) and d["apart"]
    assert lines[0]["interval"]["utility"] == pytest.approx(
        (2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3))
    )


def test_a_recipe_that_only_its_plan_completes_can_be_searched():
    """The front's `modpo` learns from rewards that the plan's own stages give."""
    recipe = Path(__file__).parents[1] / "recipes" / "front.yaml"
    made = search_spec(
        recipe,
        ["learning_rate, objective.beta"],
        ["hypervolume"],
        changes=["plan.worst={short: 0, complete: 0}"],
    )
    assert made.goals[0].front == ("goal/short", "goal/complete") and made.goals[0].worst == (0.0, 0.0)


def test_a_plan_is_searched_by_its_front(tmp_path):
    """Each trial is a front; a point that a trial lies beyond is refused; the end compares fronts on seeds
    never used.
    """
    short, complete = {"name": "length", "scale": -0.1}, {"name": "task", "objective": "complete"}
    plan = {
        "name": "front",
        "points": 2,
        "judged": 2,
        "max_new_tokens": 4,
        "goals": {"short": short, "complete": complete},
    }
    base = {
        "model": "toy:lm-small",
        "data": {"path": "toy:style/short", "n": 8},
        "eval_data": {"path": "toy:style/short_test", "n": 2},
        "objective": "dpo",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "tuner": "ssf",
        "evaluate": ["preference"],
        "plan": plan,
    }
    how = {
        "over": "learning_rate",
        "goals": "hypervolume",
        "trials": 2,
        "test_seeds": 2,
        "metric": "ranking_accuracy",
        "apart": False,
    }
    with pytest.raises(RecipeError, match="`worst` for short, complete"):
        luthier.search(base, **how, output_dir=tmp_path / "a")
    plan["worst"] = {"short": 0.0, "complete": 0.0}
    with pytest.raises(RecipeError, match="configuration 0 .*goal/short -.* lies beyond 0"):
        luthier.search(base, **how, output_dir=tmp_path / "a")
    plan["worst"]["short"] = -100.0
    found = luthier.search(base, **how, output_dir=tmp_path / "b")
    start, top = found["start"], found["found"][0]
    fronts = [
        json.loads((Path(r) / "report.json").read_text())["stats"]["front"]
        for r in found["comparison"]["arms"]["found-1"]["runs"]
    ]
    assert (
        top["by_seed"]["hypervolume"] == pytest.approx([f["hypervolume"] for f in fronts])
        and len(fronts) == 2
    )
    assert (
        top["test"]["hypervolume"] == pytest.approx(np.mean(top["by_seed"]["hypervolume"]))
        and "beyond" in top
        and "beyond" not in start
    )
    assert found["sentence"].startswith("2 configurations, 2 full runs: hypervolume on test seeds: found-1 ")
    assert "intervals of the mean over test seeds" in (tmp_path / "b" / "report.html").read_text()


# ---------------------------------------------------------------------------------------------- spaces of recipes


def test_a_space_follows_from_what_methods_declare(tiny):
    base = Recipe.load({"model": tiny, "data": SUMS, "tuner": {"name": "lora", "r": 8, "lora_alpha": 4}})
    usual = parse_space(base)
    assert {d.name for d in usual.space.dims} == {"learning_rate", "tuner.r"} and usual.recipe_of(
        usual.start
    ).yaml() == base.yaml()
    several = parse_space(
        base, ["tuner=lora|ssf|dora, learning_rate=1e-4..1e-2", "per_device_train_batch_size=4|8"]
    )
    dims = {d.name: d for d in several.space.dims}
    assert (
        dims["lora.r"].when == ("tuner", "lora")
        and dims["dora.r"].log
        and "ssf.r" not in dims
        and dims["learning_rate"].log
    )
    made = several.recipe_of(
        {"tuner": "dora", "dora.r": 32, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    )
    assert made.tuner == {"name": "lora", "use_dora": True, "r": 32} and made.learning_rate == 1e-3
    assert several.recipe_of({"tuner": "lora", "lora.r": 16}).tuner == {
        "name": "lora",
        "r": 16,
        "lora_alpha": 4,
    }, "its other settings stay"
    assert parse_space(base, ["tuner.r=2..4"]).start is None
    both = parse_space(Recipe.load({"model": tiny, "data": PAIRS, "objective": "dpo"}), ["objective=dpo|ipo"])
    assert {"objective", "dpo.beta", "ipo.beta"} <= {d.name for d in both.space.dims}
    assert both.recipe_of({"objective": "ipo", "ipo.beta": 0.3}).objective == {"name": "ipo", "beta": 0.3}


def test_layers_are_left_alone(tiny):
    base = Recipe.load({"model": tiny, "data": SUMS, "tuner": "lora"})
    flags = parse_space(base, ["layers"])
    assert [d.name for d in flags.space.dims] == [f"layers.{i}" for i in range(4)] and flags.recipe_of(
        flags.start
    ) == base
    from luthier.model.load import assemble
    from luthier.recipe.validate import build_methods

    made = flags.recipe_of({"layers.0": True, "layers.1": False, "layers.2": True, "layers.3": False})
    assert made.yaml() == only_layers(base, [0, 2], 4).yaml()
    param_groups = [s.name for s in assemble(made, build_methods(made)).tuner.param_groups()]
    assert (
        param_groups
        and all(".0." in s or ".2." in s for s in param_groups)
        and any(".2." in s for s in param_groups)
    )


@pytest.mark.parametrize(
    ("said", "how", "why"),
    [
        (["tuner.q"], {}, "has no setting 'q'"),
        (["learning_rat"], {}, "did you mean 'learning_rate'"),
        (["eval_data"], {}, "must stay the same"),
        (["lora_alpha=1..4"], {}, "a recipe has no 'lora_alpha'"),
        (["tuner.lora_alpha"], {}, "no range is declared"),
        (["tuner.r=64..4"], {}, "not a range"),
        (["objective=sft|dpo"], {}, "objective=dpo.*pairs"),
        (["tuner=lora|sff"], {}, "did you mean 'ssf'"),
        (["learning_rate=-1..1"], {}, "learning_rate"),
        ([], {"sampler": "tpee"}, "did you mean 'tpe'"),
        ([], {"budget": "100 steps"}, "not a time"),
        ([], {"budget": "1h", "trials": 3}, "not both"),
        ([], {"goals": ["ranking_accuracy"]}, "requires pairs"),
        ([], {"earlier": "nowhere"}, "holds no finished search"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny, said, how, why):
    with pytest.raises(RecipeError, match=why):
        search_spec({"model": tiny, "data": SUMS, "max_steps": 2}, said, **how)


# ---------------------------------------------------------------------------------------------- searches


@pytest.fixture
def shared(shallow) -> dict:
    return {
        "model": shallow,
        "data": SUMS,
        "dtype": "float32",
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "eval_data": 0.3,
        "tuner": "ssf",
        "learning_rate": 1e-5,
        "evaluate": ["loss"],
    }


def test_a_search_finds_says_and_writes_a_recipe_that_runs(shared, tmp_path):
    found = luthier.search(
        shared,
        space=["learning_rate=1e-5..1e-1 log", "tuner=ssf|lora"],
        goals="quality,parameters",
        constraint="parameters <= 1M",
        trials=6,
        sampler={"name": "tpe", "n_startup_trials": 4},
        test_seeds=2,
        output_dir=tmp_path / "s",
        subprocesses=False,
    )
    assert len(found["trials"]) == 6 and found["spent"] == 6 and found["trials"][0]["kind"] == "recipe"
    start, top = found["start"], found["found"][0]
    assert top["test"]["quality"] < start["test"]["quality"], "the recipe's learning rate was far too low"
    for one in (start, *found["found"]):
        assert one["gap"]["quality"] == pytest.approx(one["test"]["quality"] - one["tuning"]["quality"])
        runs = [
            json.loads((Path(r) / "report.json").read_text())
            for r in found["comparison"]["arms"][one["name"]]["runs"]
        ]
        assert (
            one["test"]["quality"] == pytest.approx(np.mean([r["after"]["loss"] for r in runs]))
            and len(runs) == 2
        )
    assert found["sentence"].startswith("6 configurations, 6 full runs: loss: found-")
    again = luthier.tune(Recipe.load(tmp_path / "s" / "found-1.yaml"), folder=tmp_path / "again")
    assert again.stats["moving"] == top["test"]["parameters"]
    page = (tmp_path / "s" / "report.html").read_text()
    assert (
        page.index(found["sentence"].replace("'", "&#39;")) < page.index("Best configurations")
        and page.count('<script type="module">') == 1
    )
    assert all(
        (tmp_path / "s" / Path(t["runs"][0]).relative_to(found["folder"]) / "report.html").is_file()
        for t in found["trials"]
    )
    assert not list((tmp_path / "s" / "trials").rglob("*.safetensors")), (
        "measured runs leave no weights behind"
    )
    later = luthier.search(
        shared,
        space=["learning_rate=1e-5..1e-1 log"],
        trials=3,
        test_seeds="0,",
        output_dir=tmp_path / "t",
        earlier=tmp_path / "s",
        subprocesses=False,
    )
    assert [t["kind"] for t in later["trials"]][:2] == ["recipe", "earlier"]
    assert later["trials"][1]["point"]["learning_rate"] == top["point"]["learning_rate"]


def test_what_was_found_is_tested_on_other_rows(shared, tmp_path):
    picked = {**shared, "data": SUMS[:40], "eval_data": SUMS[40:60]}
    how = dict(
        space="learning_rate=1e-3..1e-1 log",
        trials=2,
        test_seeds="0,",
        subprocesses=False,
        output_dir=tmp_path / "s",
    )
    with pytest.raises(RecipeError, match="--test-data: 3 of 6 rows also stand in data or eval_data"):
        luthier.search(picked, test_data=SUMS[57:63], **how)
    found = luthier.search(picked, test_data=SUMS[60:], **how)
    (run,) = found["comparison"]["arms"]["found-1"]["runs"]
    report = (Path(run) / "report.json").read_text()
    assert found["sentence"].endswith("here).") and "test seeds and rows" in found["sentence"]
    assert "the second on test rows" in (tmp_path / "s" / "report.html").read_text()
    assert json.loads(report)["stats"]["held_out_rows"] == 4


def test_a_killed_search_goes_on_as_if_it_had_not_been(shared, tmp_path, monkeypatch):
    how = dict(
        space="learning_rate=1e-4..1e-1 log",
        trials=2.5,
        sampler={"name": "halving", "n": 2, "eta": 2, "min_share": 0.5},
        test_seeds="0,",
        subprocesses=False,
    )
    whole = luthier.search(shared, output_dir=tmp_path / "a", **how)
    assert [t["share"] for t in whole["trials"]] == [1, 0.5, 0.5, 1] and whole["trials"][3]["number"] in (
        1,
        2,
    )
    from luthier.run import run

    calls, real = [0], run.perform

    def dies(*a, **k):
        calls[0] += 1
        if calls[0] in (3, 6):  # in the search, and on test seeds
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(run, "perform", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            luthier.search(shared, output_dir=tmp_path / "b", **how)
    parts = luthier.search(shared, output_dir=tmp_path / "b", **how)
    same = lambda found: [(t["number"], t["point"], t["share"], t["goals"]) for t in found["trials"]]
    assert same(parts) == same(whole) and parts["found"][0]["test"] == whole["found"][0]["test"]
    more = luthier.search(shared, output_dir=tmp_path / "b", **{**how, "trials": 3})
    assert same(more)[: len(same(parts))] == same(parts) and more["spent"] > parts["spent"]
    with pytest.raises(RecipeError, match="holds another search"):
        luthier.search(shared, output_dir=tmp_path / "b", **{**how, "space": "tuner=ssf|lora"})


def test_two_commands_do_not_share_a_folder(shared, tmp_path):
    import fcntl

    (tmp_path / "s").mkdir()
    with open(tmp_path / "s" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="another process"):
            luthier.search(shared, output_dir=tmp_path / "s", subprocesses=False)


def test_a_database_is_shared_by_workers(tmp_path):
    """Two workers on one sqlite file: each goes on with its own, both see everything, the budget is one."""
    url, space, wanted = (
        f"sqlite:///{tmp_path / 'study.db'}",
        Space((Dim("x"),)),
        parse_goals(["loss"], "loss"),
    )
    books = [TrialStore(space, wanted, (), url, "s", worker) for worker in ("a", "b")]
    measure = lambda t, i: Measurement({1000: {"loss": t.user_attrs["point"]["x"]}})
    left = books[0].begin(Suggestion({"x": 0.5}))
    optimize(books[1], build("searcher", "random"), measure, 3)
    assert len(books[1].finished()) == 3 and len(books[0].running()) == 1 and not books[1].running()
    done = optimize(books[0], build("searcher", "random"), measure, 4)
    assert len(done) == 4 and done[-1].observation.number == left.number
    with pytest.raises(RecipeError, match="--storage"):
        TrialStore(space, wanted, (), "nonsense://", "s")


@pytest.mark.parametrize("name", ["random", "tpe", "bayes"])
def test_workers_do_not_ask_the_same(name):
    if name not in names("searcher"):
        pytest.skip("not here")
    space, wanted = Space((Dim("x"),)), parse_goals(["loss"], "loss")
    books = [TrialStore(space, wanted, (), None, "s", worker) for worker in "ab"]
    books[1].study = books[0].study
    asked = []

    def measure(t, i):
        """While one measures, the other asks."""
        asked.append(t.user_attrs["point"]["x"])
        if len(asked) % 2:
            optimize(
                books[1],
                build("searcher", name),
                measure,
                searching.full_runs(books[1].finished()) + 2,
                crew=True,
            )
        return Measurement({1000: {"loss": t.user_attrs["point"]["x"]}})

    optimize(books[0], build("searcher", name), measure, 8, crew=True)
    assert len(asked) >= 8 and len(set(asked)) == len(asked)


def test_a_goal_that_nothing_moves_is_told():
    wanted = parse_goals(["loss", "trained"], "loss")
    tried = [
        searching.Trial(
            Observation(i, {"x": i}, (float(i), 5.0)),
            Measurement({1: {"loss": float(i), "trained": 5.0}}),
            {"loss": float(i), "trained": 5.0},
            "asked",
        )
        for i in range(3)
    ]
    assert searching.unmoved(wanted, tried) == [
        "trained was 5.00 in all 3 configurations: nothing that was searched changes it"
    ]
    assert not searching.unmoved(wanted, tried[:1])


def test_the_last_run_of_a_budget_is_begun_by_one_worker_only():
    """Both read that one run is left; who writes second takes its own back."""
    space, wanted = Space((Dim("x"),)), parse_goals(["loss"], "loss")
    books = [TrialStore(space, wanted, (), None, "s", worker) for worker in "ab"]
    books[1].study = books[0].study
    measure = lambda t, i: Measurement({1000: {"loss": t.user_attrs["point"]["x"]}})
    searcher = build("searcher", "random")

    class Slow:
        def ask(self, *of):
            books[0].begin(Suggestion({"x": 0.25}))
            return searcher.ask(*of)

    optimize(books[0], searcher, measure, 2)
    assert len(optimize(books[1], Slow(), measure, 3, crew=True)) == 2 and not books[1].running()  # type: ignore[arg-type]
    assert len(optimize(books[0], searcher, measure, 3, crew=True)) == 3
    assert [t.measurement.by_seed[1000]["loss"] for t in books[0].finished()][-1] == 0.25


def test_workers_of_a_cluster_spend_one_budget(shared, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from luthier.study import cluster

    found = luthier.search(
        shared,
        space="learning_rate=1e-4..1e-1 log",
        trials=5,
        test_seeds="0,",
        output_dir=tmp_path / "s",
        workers=2,
        subprocesses=False,
    )
    assert found["spent"] == len(found["trials"]) == 5 and found["trials"][0]["kind"] == "recipe"
    assert len({json.dumps(t["point"]) for t in found["trials"][1:]}) == 4
    monkeypatch.setattr(cluster.load_ray(), "nodes", lambda: [1, 2])
    with pytest.raises(RecipeError, match="need --storage"):
        cluster.run_workers(2, print, None, print)


def test_a_run_that_diverges_is_no_end(tmp_path):
    book = TrialStore(Space((Dim("x"),)), parse_goals(["loss"], "loss"), parse_limits(["loss <= 10"], "loss"))
    measure = lambda t, i: (
        Measurement({}, 1.0, "it diverged")
        if i % 3
        else Measurement({1000: {"loss": t.user_attrs["point"]["x"]}}, 1.0)
    )
    tried = optimize(book, build("searcher", "tpe"), measure, 20)
    assert (
        sum(bool(t.measurement.failed) for t in tried) == 13
        and not searching.choose(tried)[0].measurement.failed
    )
    assert optimize(book, build("searcher", "tpe"), measure, seconds=22.0)[-1].observation.number == 21


def test_what_moves_nothing_is_told_and_not_paid_for():
    book = TrialStore(Space((Dim("x"),)), parse_goals(["loss"], "loss"), ())
    idle = lambda t, i: (
        Measurement({}, 0.0, "tuner 'autopeft' moves nothing", "nothing_moves")
        if i % 2
        else Measurement({1000: {"loss": 0.5}}, 1.0)
    )
    tried = optimize(book, build("searcher", "random"), idle, 4)
    assert searching.full_runs(tried) == 4 and len(tried) == 7
    never = optimize(
        TrialStore(Space((Dim("x"),)), parse_goals(["loss"], "loss"), ()),
        build("searcher", "random"),
        lambda t, i: idle(t, 1),
        4,
    )
    assert len(never) == 4, "and where nothing ever moves it ends all the same"
    made = SimpleNamespace(goals=parse_goals(["accuracy", "parameters"], "loss"))
    assert searching.progress_line(made, tried[1]).startswith(
        "1. x 0."
    ) and "left out, tuner 'autopeft' moves nothing" in searching.progress_line(made, tried[1])
    told = searching.Trial(
        Observation(3, {"x": 0.25}, (0.5, 1234.0), share=1 / 3),
        Measurement({}),
        {"accuracy": 0.5, "parameters": 1234.0},
        "asked",
    )
    assert (
        searching.progress_line(made, told)
        == "3. x 0.25 (33.3% of the steps): accuracy 50.0%, parameters 1.23K"
    )


def test_the_command_line_knows_it(tiny):
    from typer.testing import CliRunner

    from luthier.cli import app

    for option in ("--space", "--over"):
        out = CliRunner().invoke(app, ["search", f"model={tiny}", "data=toy:people/new", option, "tuner.q"])
        assert out.exit_code == 2 and "has no setting 'q'" in out.output


def test_arguments_of_the_first_version_are_read(shared, tmp_path):
    """By their new names, with a note of it; a folder's old quest.json still says which search it holds."""
    from luthier.report.console import Callback

    callback = Callback()
    how = {"over": "learning_rate=1e-5..1e-1 log", "apart": False, "watch": callback, "folder": tmp_path}
    (tmp_path / "quest.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(RecipeError, match="holds another search"):
        luthier.search(shared, **how)
    assert "over is now called space" in callback.notes
    with pytest.raises(RecipeError, match="give one of them"):
        luthier.search(shared, space="learning_rate", **how)
