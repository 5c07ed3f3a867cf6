"""Searches: what a searcher asks, what a search goes over, refuses, goes on with after a stop, and says of
what it found.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import luthier
from helpers.paths import ROOT
from helpers.rows import SUMS
from luthier.errors import RecipeError
from luthier.methods.searchers._base import (
    Dim,
    Observation,
    Space,
    Suggestion,
)
from luthier.recipe.recipe import Recipe
from luthier.registry import build, names
from luthier.report.search_result import read_result
from luthier.storage import files
from luthier.studio.studies import search_result
from luthier.study import search as searching
from luthier.study.goals import front_figure, parse_goals, parse_limits
from luthier.study.search import Measurement, TrialStore, optimize, parse_seeds, search_spec

pytest.importorskip("optuna")


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
    with pytest.raises(RecipeError, match="seeds 2 are in both --seeds and --test-seeds"):
        search_spec(base, seeds="1,2", test_seeds="2,3")
    made = search_spec(base)
    assert not set(made.seeds) & set(made.test_seeds) and made.test_seeds == (0, 1, 2)
    assert parse_seeds(3, 1000, "") == (1000, 1001, 1002) and parse_seeds("7,", 0, "") == (7,)
    for bad in ("x", "0", "1,1"):
        with pytest.raises(RecipeError, match="--seeds"):
            parse_seeds(bad, 0, "--seeds")


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


def test_a_recipe_that_only_its_plan_completes_can_be_searched():
    """The front's `modpo` learns from rewards that the plan's own stages give."""
    recipe = ROOT / "recipes" / "plans" / "studies" / "front.yaml"
    made = search_spec(
        recipe,
        ["learning_rate, objective.beta"],
        ["hypervolume"],
        changes=["plan.worst={short: 0, complete: 0}"],
    )
    assert made.goals[0].front == ("goal/short", "goal/complete") and made.goals[0].worst == (0.0, 0.0)


@pytest.mark.slow
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
    with pytest.raises(RecipeError, match="set `worst` in plan 'front' for short, complete"):
        luthier.search(base, **how, output_dir=tmp_path / "a")
    plan["worst"] = {"short": 0.0, "complete": 0.0}
    beyond = "configuration 0 .*goal/short -.* is worse than the reference point 0"
    with pytest.raises(RecipeError, match=beyond):
        luthier.search(base, **how, output_dir=tmp_path / "a")
    plan["worst"]["short"] = -100.0
    found = luthier.search(base, **how, output_dir=tmp_path / "b")
    start, top = found["baseline"], found["chosen"][0]
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


@pytest.mark.slow
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
    assert len(found["trials"]) == 6 and found["full_runs"] == 6 and found["trials"][0]["kind"] == "recipe"
    start, top = found["baseline"], found["chosen"][0]
    assert top["test"]["quality"] < start["test"]["quality"], "the recipe's learning rate was far too low"
    for one in (start, *found["chosen"]):
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
    for_studio = search_result(tmp_path / "s" / "search.json", tmp_path)
    assert [trial["number"] for trial in for_studio["trials"]] == [t["number"] for t in found["trials"]]
    assert for_studio["arms"][0]["name"] == "recipe" and for_studio["arms"][0]["runs"][0].startswith("s")
    assert for_studio["pairs"][0]["label"] == "loss" and for_studio["maps"]
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
    with pytest.raises(RecipeError, match="--test-data: 3 of 6 rows are also in data or eval_data"):
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
    assert same(parts) == same(whole) and parts["chosen"][0]["test"] == whole["chosen"][0]["test"]
    more = luthier.search(shared, output_dir=tmp_path / "b", **{**how, "trials": 3})
    assert same(more)[: len(same(parts))] == same(parts) and more["full_runs"] > parts["full_runs"]
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
            "suggested",
        )
        for i in range(3)
    ]
    assert searching.unmoved(wanted, tried) == [
        "trained was 5.00 in all 3 configurations: no setting in the search space changes it"
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
    trials = optimize(books[1], Slow(), measure, 3, crew=True)  # type: ignore[arg-type]
    assert len(trials) == 2 and not books[1].running()
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
    assert found["full_runs"] == len(found["trials"]) == 5 and found["trials"][0]["kind"] == "recipe"
    assert len({json.dumps(t["point"]) for t in found["trials"][1:]}) == 4
    monkeypatch.setattr(cluster.load_ray(), "nodes", lambda: [1, 2])
    with pytest.raises(RecipeError, match="needs --storage"):
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
        "suggested",
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
    with pytest.raises(RecipeError, match="keep one of them"):
        luthier.search(shared, space="learning_rate", **how)


def test_trials_and_results_of_version_0_1_are_read(tmp_path):
    """Its trials have other names of attributes and no codes; its search.json other keys."""
    store = TrialStore(Space((Dim("x", 0, 1),)), parse_goals(["loss"], "loss"), ())
    trial = store.begin(Suggestion({"x": 0.5}))
    store.end(trial, Measurement({}, 2.0, "tuner 'autopeft' moves nothing: all is pruned", "nothing_moves"))
    (today,) = store.finished()
    former = SimpleNamespace(number=trial.number, user_attrs=dict(store.study.trials[0].user_attrs))
    attrs = former.user_attrs
    attrs["took"], attrs["of"], attrs["kind"] = attrs.pop("seconds"), attrs.pop("configuration"), "asked"
    del attrs["code"]
    assert store._trial(former) == today and today.kind == "suggested" and today.measurement.idle

    line = {"name": "found-1", "said": "x 0.5", "point": {"x": 0.5}}
    trial = {"said": "x 0.5", "over": 0.0, "took": 2.0}
    old = {"found": [line], "start": line, "over": [], "spent": 1, "took": 2.0, "trials": [trial]}
    files.write_json(tmp_path / "search.json", old)
    result = read_result(tmp_path / "search.json")
    assert set(result) == {"chosen", "baseline", "space", "full_runs", "seconds", "trials"}
    assert result["chosen"][0]["description"] == result["baseline"]["description"] == "x 0.5"
    assert result["trials"] == [{"description": "x 0.5", "violation": 0.0, "seconds": 2.0}]


def test_only_what_is_no_worse_than_the_recipe_is_chosen():
    def trial(number, kind, *values):
        seen = Observation(number, {"x": number}, values)
        return SimpleNamespace(feasible=True, kind=kind, observation=seen)

    recipe, better, worse = trial(0, "recipe", 1.0), trial(1, "suggested", 0.9), trial(2, "suggested", 1.1)
    assert searching.choose([recipe, better, worse]) == [better]
    assert searching.choose([recipe, worse]) == [] and searching.choose([better, worse]) == [better, worse]
    other, dominated = trial(3, "suggested", 1.1, 0.5), trial(4, "suggested", 1.0, 0.9)
    assert searching.choose([trial(0, "recipe", 1.0, 0.8), other, dominated]) == [other]
