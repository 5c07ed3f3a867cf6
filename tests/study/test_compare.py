"""Side by side: what is said of arms, what is refused, what goes on after a stop."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest

import luthier
from helpers.rows import SUMS
from luthier.errors import DiskError, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.report.console import Console
from luthier.study.compare import (
    ComparisonSpec,
    arms_of,
    parse_budget,
    resolve_arms,
    run_comparison,
    sentence,
)
from luthier.study.compare.run import Runner


@pytest.fixture
def shared(shallow) -> dict:
    return {
        "model": shallow,
        "data": SUMS,
        "dtype": "float32",
        "objective": "sft",
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "eval_data": 0.3,
        "evaluate": ["loss"],
    }


def spec(shared, arms: dict, **how) -> ComparisonSpec:
    recipes = {name: Recipe.load({**shared, **keys}) for name, keys in arms.items()}
    return ComparisonSpec(recipes, subprocesses=False, **how)


@pytest.mark.slow
def test_the_same_recipe_twice_is_no_difference(shared, tmp_path):
    arm = {"tuner": "lora", "learning_rate": 1e-2, "evaluate": ["loss", "accuracy", "calibration"]}
    found = run_comparison(spec(shared, {"a": arm, "b": arm}, seeds=2, together=False), tmp_path / "c")
    assert not any(p["apart"] for pairs in found["pairs"].values() for p in pairs)
    assert "no significant difference" in found["sentence"] and "no winner" in found["sentence"]
    assert found["front"] and set(found["table"]["loss"]) == {"a", "b"}
    for metric in ("loss", "accuracy", "calibration_error", "trained", "peak_memory_mb", "seconds"):
        assert metric in found["table"]


@pytest.mark.slow
def test_an_arm_made_worse_is_found_and_stopped(shared, tmp_path):
    arms = {
        "good": {"tuner": "full", "learning_rate": 3e-3},
        "close": {"tuner": "full", "learning_rate": 2.9e-3},
        "worse": {"tuner": "lora", "learning_rate": 1e-7},
        "awful": {"tuner": "full", "learning_rate": 3e-1},
    }
    found = run_comparison(spec({**shared, "max_steps": 24}, arms, seeds=3, least_steps=6), tmp_path / "c")
    assert "awful" in found["stopped"] or "worse" in found["stopped"]
    kept = run_comparison(
        spec({**shared, "max_steps": 24}, {k: arms[k] for k in ("good", "worse")}, seeds=3), tmp_path / "d"
    )
    assert kept["sentence"].startswith("Loss: good") and "better than worse" in kept["sentence"]
    pair = kept["pairs"]["loss"][0]
    assert pair["apart"] and pair["low"] <= pair["difference"] <= pair["high"] < 0


def test_values_by_row_are_what_the_metric_is_the_mean_of(shared, tmp_path):
    report = luthier.tune(
        {**shared, "tuner": "full", "evaluate": ["loss", "accuracy", "forgetting"]}, folder=tmp_path / "r"
    )
    for when, metrics in (("before", report.before), ("after", report.after)):
        by_row = json.loads((tmp_path / "r" / f"per_example-{when}.json").read_text())
        for name in ("loss", "accuracy", "retention_loss"):
            assert sum(by_row[name].values()) / len(by_row[name]) == pytest.approx(metrics[name], rel=1e-6)


def test_a_paused_run_ends_as_one_that_was_not(shared, tmp_path):
    recipe = {**shared, "tuner": "full", "learning_rate": 1e-3}
    paused = luthier.tune({**recipe}, folder=tmp_path / "a")
    from luthier.run.run import perform

    half = perform(Recipe.load(recipe), tmp_path / "b", stop_at=0.5)
    assert half.stats["paused_at"] == 4 and not (tmp_path / "b" / "report.json").exists()
    whole = perform(Recipe.load(recipe), tmp_path / "b")
    assert whole.after == paused.after and whole.losses == paused.losses


def test_a_killed_comparison_goes_on(shared, tmp_path, monkeypatch):
    from luthier.run import run

    arms = {"a": {"tuner": "full"}, "b": {"tuner": "lora"}}
    calls, real = [], run.perform

    def dies(recipe, folder, *rest, **how):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(folder.name)
        return real(recipe, folder, *rest, **how)

    monkeypatch.setattr(run, "perform", dies)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(spec(shared, arms, seeds=2), tmp_path / "c")
    monkeypatch.setattr(
        run,
        "perform",
        lambda recipe, folder, *r, **h: (calls.append(folder.name), real(recipe, folder, *r, **h))[1],
    )
    found = run_comparison(spec(shared, arms, seeds=2), tmp_path / "c")
    assert sorted(calls) == ["a-0", "a-1", "b-0", "b-1"]  # nothing was run twice
    assert found["table"]["loss"]["a"]["by_seed"]


@pytest.mark.slow
def test_a_budget_of_tokens_gives_each_arm_its_steps(shared, tmp_path):
    arms = {"a": {"tuner": "full"}, "b": {"tuner": "lora", "per_device_train_batch_size": 4}}
    found = run_comparison(spec(shared, arms, seeds=1, budget="600 tokens"), tmp_path / "c")
    steps = json.loads((tmp_path / "c" / "budget.json").read_text())
    assert steps["b"] > 1.5 * steps["a"]
    assert any("per_device_train_batch_size" in n for n in found["notes"]) and any(
        "one seed" in n for n in found["notes"]
    )
    assert [parse_budget(x) for x in ("30m", "2h", "500", "2k tokens")] == [
        ("seconds", 1800),
        ("seconds", 7200),
        ("steps", 500),
        ("tokens", 2000),
    ]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_each_arm_takes_its_own_best_rate(shared, tmp_path, monkeypatch):
    arms = {"full": {"tuner": "full"}, "lora": {"tuner": "lora"}}
    how = {"seeds": 1, "learning_rates": (1e-6, 3e-3, 3.0)}
    told = StringIO()
    found = run_comparison(spec(shared, arms, **how), tmp_path / "c", Console(told))
    lines = [line for line in told.getvalue().splitlines() if not line.startswith("·")]
    value = json.loads((tmp_path / "c" / "learning_rates.json").read_text())["full"]["0.003"]
    assert len(lines) == 8 and any(
        line.startswith(f"full, learning rate 0.003: loss {value:.2f}") for line in lines
    )
    assert lines[-1].startswith("lora, seed 0: loss ") and " left)" in lines[0] and "left" not in lines[-1]
    assert found["arms"]["full"]["learning_rate"] == 3e-3 and found["arms"]["lora"]["learning_rate"] >= 3e-3
    picked = json.loads((tmp_path / "c" / "learning_rates.json").read_text())
    assert set(picked["full"]) == {"1e-06", "0.003", "3"} and any(
        "learning rate 0.003" in note for note in found["notes"]
    )
    monkeypatch.setattr("luthier.run.run.perform", lambda *a, **k: pytest.fail("all of this was known"))
    assert (
        run_comparison(spec(shared, arms, **how), tmp_path / "c")["table"]["loss"] == found["table"]["loss"]
    )
    with pytest.raises(RecipeError, match="two or more values above 0"):
        resolve_arms(spec(shared, arms, learning_rates=(1e-3,)))


@pytest.mark.slow
def test_a_plan_is_an_arm_like_others(shared, tmp_path):
    arms = {
        "once": {"tuner": "full", "learning_rate": 1e-3},
        "twice": {"tuner": "full", "learning_rate": 1e-3, "plan": {"name": "sequence", "acts": [{}, {}]}},
        "same": {"tuner": "full", "learning_rate": 1e-3},
    }
    found = run_comparison(spec(shared, arms, seeds=2), tmp_path / "c")
    assert (
        found["table"]["loss"]["twice"]["mean"] < found["table"]["loss"]["once"]["mean"]
        and found["table"]["loss"]["twice"]["rows"] > 1
    )
    assert found["table"]["loss"]["same"] == found["table"]["loss"]["once"] and not found["stopped"]
    acts = [
        json.loads((tmp_path / "c" / "twice-0" / f"run-{k}" / "report.json").read_text())["stats"]["seconds"]
        for k in (0, 1)
    ]
    assert found["table"]["seconds"]["twice"]["by_seed"][0] == pytest.approx(sum(acts))
    with pytest.raises(RecipeError, match="which --budget cannot divide"):
        resolve_arms(spec(shared, arms, budget="5 steps"))


@pytest.mark.slow
def test_the_page_answers_first_and_runs_nothing(shared, tmp_path):
    rows = [{**r, "prompt": r["prompt"] + "<script>alert(1)</script>"} for r in SUMS]
    arms = {"a": {"tuner": "full"}, "b<i>": {"tuner": "lora"}}
    found = run_comparison(
        spec(
            {**shared, "data": rows, "evaluate": ["loss", "generate"]},
            {"a": arms["a"], "b": arms["b<i>"]},
            seeds=1,
        ),
        tmp_path / "c",
    )
    page = Page()
    page.feed((tmp_path / "c" / "report.html").read_text())
    assert found["sentence"] in page.text and page.tags.count("script") == 1 + page.tags.count("figure")
    assert page.text.index(found["sentence"]) < page.text.index("Paired differences")
    for link in ("a-0/report.html", "b-0/report.html"):
        assert (Path(found["folder"]) / link).is_file() and link in (
            tmp_path / "c" / "report.html"
        ).read_text()


@pytest.mark.parametrize(
    ("arms", "how", "said"),
    [
        ({"a": {}}, {}, "two arms"),
        ({"a": {}, "b": {"eval_data": 0.1}}, {}, "differ in eval_data"),
        ({"a": {}, "b": {"tuner": "bitfit", "objective": "dpo"}}, {}, "arm b: .*pairs"),
        ({"a": {}, "b": {}}, {"seeds": 0}, "seeds"),
        ({"a": {}, "b": {}}, {"budget": "soon"}, "--budget: 'soon'"),
        ({"a": {}, "b": {}}, {"metric": "los"}, "did you mean 'loss'"),
    ],
)
def test_what_cannot_be_compared_is_refused(shared, tmp_path, arms, how, said):
    with pytest.raises(RecipeError, match=said):
        run_comparison(spec({**shared, "max_steps": 1}, arms, **{"seeds": 1, **how}), tmp_path / "c")


def test_two_commands_do_not_share_a_folder(shared, tmp_path):
    import fcntl

    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="another process"):
            run_comparison(spec(shared, {"a": {}, "b": {}}), tmp_path / "c")


def test_arms_from_the_command_line(tmp_path, tiny):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {tiny}\ntuner: {'lora' if name == 'one' else 'full'}\n"
        )
    arms = arms_of([str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")], ["learning_rate=0.5"])
    assert list(arms) == ["one", "two"] and arms["two"].tuner == "full" and arms["one"].learning_rate == 0.5
    assert list(arms_of([], [], "lora,ssf", "sft")) == ["lora", "ssf"]
    assert list(arms_of([], [], "lora,ssf", "dpo,ipo")) == ["lora-dpo", "lora-ipo", "ssf-dpo", "ssf-ipo"]
    with pytest.raises(RecipeError, match="two recipes or more"):
        arms_of([str(tmp_path / "one.yaml")])
    assert "no winner" in sentence(
        "loss", {"a": {"mean": 1}, "b": {"mean": 2}}, [{"a": "a", "b": "b", "apart": False}], {}
    )
    assert resolve_arms(ComparisonSpec({k: r.but(data=SUMS) for k, r in arms.items()}))[0]["one"].evaluate


@pytest.mark.slow
def test_arms_that_share_a_base_run_side_by_side_and_find_the_same(shared, tmp_path):
    """Pausing where arms may be stopped early, and for good."""
    lora = {"name": "lora", "r": 4}
    arms = {
        "low": {"tuner": lora},
        "high": {"tuner": lora | {"r": 8}, "learning_rate": 1e-2},
        "full": {"tuner": "full"},
    }
    both = {
        way: run_comparison(spec(shared, arms, seeds=2, together=way), tmp_path / str(way))
        for way in (True, False)
    }
    assert both[True]["stopped"].keys() == both[False]["stopped"].keys()
    for arm, want in both[False]["table"]["loss"].items():
        assert both[True]["table"]["loss"][arm]["by_seed"] == pytest.approx(want["by_seed"], abs=1e-5)
    assert {"high"} <= both[True]["table"]["loss"].keys()
    assert "peak_memory_mb" in both[False]["table"] and "peak_memory_mb" not in both[True]["table"]


def test_batched_runs_of_which_one_diverges_are_run_alone(shared, tmp_path):
    arms = {
        "a": {"tuner": "lora"},
        "b": {"tuner": "lora", "learning_rate": 1e30, "optim": "sgd"},
        "c": {"tuner": "lora", "learning_rate": 1e-3, "optim": "sgd"},
    }
    found = run_comparison(spec(shared, arms, seeds=1, stop_early=False), tmp_path / "c")
    assert list(found["stopped"]) == ["b"] and {"a", "c"} <= set(found["table"]["loss"])


def test_the_sentence_says_how_much_and_whether_anything_was_learned():
    cells = {"a": {"mean": 1.0}, "b": {"mean": 1.2}, "c": {"mean": 1.01}}
    pairs = [
        {"a": "a", "b": "b", "apart": True, "difference": -0.2, "low": -0.3, "high": -0.1},
        {"a": "a", "b": "c", "apart": False, "difference": -0.01, "low": -0.05, "high": 0.03},
    ]
    gains = {"a": {"mean": 1.0}, "b": {"mean": 0.8}, "c": {"mean": 0.005}}
    text = sentence("loss", cells, pairs, {}, 2.0, gains)
    assert text == (
        "Loss: a 1.00 (untuned 2.00), better than b by 0.20 (0.10 to 0.30); no significant difference from c"
        " (−0.05 to +0.03); c learned next to nothing."
    )
    gains = {"a": {"mean": 0.01}, "b": {"mean": 0.0}}
    cells = {"a": {"mean": 1.99}, "b": {"mean": 2.0}}
    assert "both learned next to nothing" in sentence("loss", cells, [], {}, 2.0, gains)


def test_each_arm_of_a_grid_has_a_rate_of_its_own(tmp_path, tiny):
    (tmp_path / "one.yaml").write_text(f"model: {tiny}\nlearning_rate: 2.0e-3\n")
    source, default = [str(tmp_path / "one.yaml")], Recipe.load({"tuner": "full"}).learning_rate
    arms = arms_of(source, [], "lora,full")
    assert arms["lora"].learning_rate == 2e-3 and arms["full"].learning_rate == pytest.approx(10 * default)
    arms = arms_of(source, ["learning_rate=0.5"], "lora,full")
    assert arms["lora"].learning_rate == arms["full"].learning_rate == 0.5
    assert arms_of([], [f"model={tiny}"], "lora,full")["full"].learning_rate == default


def test_an_arm_that_cannot_run_is_left_out_and_arms_are_added(shared, tmp_path):
    shared = {**shared, "max_steps": 2, "evaluate": ["loss"]}
    arms = {
        "a": {"tuner": "lora"},
        "none": {"tuner": {"name": "lora", "target_modules": ["no_such_layer"]}},
        "b": {"tuner": "full"},
    }
    found = run_comparison(spec(shared, arms, seeds=1), tmp_path / "c")
    assert list(found["stopped"]) == ["none"] and "left out: none" in found["sentence"]
    assert not (tmp_path / "c" / "none-0").exists() and set(found["table"]["loss"]) == {"a", "b"}
    added = run_comparison(spec(shared, {"c": {"tuner": "ssf"}}, seeds=1), tmp_path / "c")
    assert set(added["table"]["loss"]) == {"a", "b", "c"} and any("added" in note for note in added["notes"])
    assert added["table"]["loss"]["a"] == found["table"]["loss"]["a"]
    with pytest.raises(RecipeError, match="holds another comparison"):
        run_comparison(spec(shared, {"a": {"tuner": "loldu"}}, seeds=1), tmp_path / "c")


def test_a_full_disk_is_no_arms_fault(shared, tmp_path, monkeypatch):
    def full(self, *run):
        raise DiskError("the disk is full")

    monkeypatch.setattr(Runner, "perform", full)
    arms = {"a": {"tuner": "lora"}, "b": {"tuner": "full"}}
    for how in ({"together": False}, {"learning_rates": (1e-3, 1e-2)}, {"budget": "1s"}):
        with pytest.raises(DiskError, match="is full"):
            run_comparison(spec(shared, arms, seeds=1, **how), tmp_path / next(iter(how)))
