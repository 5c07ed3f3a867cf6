"""The claims bench: files are understood or refused in a sentence, verdicts follow from intervals, a killed
bench goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from helpers.paths import ROOT
from luthier.cli import app
from luthier.errors import NotFinite, RecipeError
from luthier.recipe import catalogue
from luthier.recipe.recipe import Recipe
from luthier.run import subprocess as apart
from luthier.study.reproduce import judge, page, run, spec
from luthier.study.statistics import bootstrap_interval, seeds_for, t_interval

HOME = ROOT / "benchmarks" / "claims"


TOY = {
    "claim": "More steps learn more.",
    "row": "lisa",
    "budget": "Equal rows.",
    "shared": {
        "model": "toy:lm-small",
        "data": {"path": "toy:style/new", "n": 8},
        "eval_data": {"path": "toy:style/new_test", "n": 4},
        "tuner": "ssf",
        "per_device_train_batch_size": 2,
        "evaluate": ["loss"],
    },
    "arms": {"two": {"max_steps": 2, "learning_rate": [1e-4, 1e-2]}, "none": {"max_steps": 0}},
    "metric": "loss",
    "expect": ["two < none by 0", "none = before within 0", "two > before by 9"],
    "seeds": 2,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY, sort_keys=False), encoding="utf-8")
    return tmp_path


def change(folder: Path, **keys) -> None:
    given = {k: v for k, v in {**TOY, **keys}.items() if v is not None}
    (folder / "toy.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")


def test_a_claim_runs_and_goes_on_where_it_was(folder, monkeypatch):
    """Stopped after three runs; what was finished is not done again, and all of it is what one go would give.
    The sweep's best lies at its edge, so it goes on beyond it.
    """
    here, done, said = run._in_process, [], []

    def killed(keys, where):
        if len(done) == 3:
            raise KeyboardInterrupt
        here(keys, where)
        done.append(where.name)

    monkeypatch.setattr(run, "_in_process", killed)
    with pytest.raises(KeyboardInterrupt):
        run.reproduce("toy", folder=folder, runs=folder / "runs", tell=said.append)
    assert page.read_result("toy", folder) is None and "about" in said[0] and "left" in said[0]
    monkeypatch.setattr(run, "_in_process", lambda keys, where: (here(keys, where), done.append(where.name)))
    found = run.reproduce("toy", folder=folder, runs=folder / "runs", tell=said.append)
    assert len(done) == len(set(done)) and sum("was finished" in line for line in said) == 3
    values = sorted(float(value) for value in found["sweeps"]["two"])
    assert len(done) == len(values) + 4 and values[:3] == [1e-4, 1e-2, 1.0]

    better, same, far = found["expectations"]
    assert same["verdict"] == spec.HOLDS and same["none"] == same["before"] and same["interval"] == [0, 0]
    assert far["verdict"] == spec.FAILS == found["verdict"]
    assert found["tuning_seed"] == 1000 and found["at_edge"] == []
    assert values[0] < found["learning_rates"]["two"] < values[-1]
    assert found["power"] == {"pilot": 2} and far["level"] == judge.TWO_LOOKS
    assert better["none"][0] != better["none"][1], "each seed is measured on other rows"
    assert better["difference"] == pytest.approx(
        sum(a - b for a, b in zip(better["two"], better["none"])) / 2, abs=1e-3
    )
    assert {"cpu", "cores", "versions"} <= set(found["machine"]) and found["seconds"] > 0
    assert json.loads((folder / "results/toy.json").read_text(encoding="utf-8")) == found
    assert not [*(folder / "runs").rglob("*.safetensors")], "no weights are left behind"

    text = page.page(folder)
    assert "| [toy](#toy) | **not held** | two &lt; none by 0 in `loss` |" in text and "2 seeds." in text
    assert "More steps learn more. Equal rows." in text and "by seed: two" in text
    change(folder, metric=None, expect="two < none by 0.1 in loss")
    assert page.listing(folder)[0][
        "verdict"
    ] == "not run since it was changed" and "not run since" in page.page(folder)


@pytest.mark.slow
def test_a_fresh_run_measures_its_own_memory(folder):
    """A process begins with the peak of the one it came from: the shell between keeps this one's out."""
    hold = bytearray(900 * 2**20)
    hold[::4096] = b"x" * len(hold[::4096])
    change(
        folder,
        fresh=True,
        arms={"a": {"max_steps": 0}, "b": {"max_steps": 1}},
        expect="b > a by 0 in stats.peak_memory_mb",
        seeds=2,
    )
    claim = spec.read_claim("toy", folder)
    apart.tune(claim.recipe("a", 0), folder / "runs/a")
    said = json.loads((folder / "runs/a/report.json").read_text(encoding="utf-8"))
    assert 100 < said["stats"]["peak_memory_mb"] < 900
    with pytest.raises(RecipeError, match="no toy task .nowhere."):
        apart.tune({**claim.recipe("a", 0), "data": "toy:nowhere"}, folder / "runs/b")
    with pytest.raises(NotFinite, match="is not finite at step"):  # the type comes through, not a sentence
        apart.tune(
            {**claim.recipe("a", 0), "max_steps": 4, "learning_rate": 1e30, "warmup_steps": 0},
            folder / "runs/c",
        )


@pytest.mark.parametrize(
    ("said", "low", "high", "verdict"),
    [
        ("two > none by 0.1", 0.2, 0.3, "held"),
        ("two > none by 0.1", 0.1, 0.3, "held"),
        ("two > none by 0.1", 0.05, 0.3, "undecided"),
        ("two > none by 0.1", -0.3, 0.05, "not held"),
        ("two > none by 0.1", -0.3, -0.2, "not held"),
        ("two < none by 0.1", -0.3, -0.2, "held"),
        ("two < none by 0.1", -0.3, 0.2, "undecided"),
        ("two < none by 0.1", -0.05, 0.2, "not held"),
        ("two < none by -0.1", -0.3, 0.1, "held"),
        ("two < none by -0.1", 0.05, 0.2, "undecided"),
        ("two > none by -0.1", -0.3, -0.2, "not held"),
        ("two = none within 0.1", -0.1, 0.05, "held"),
        ("two = none within 0.1", -0.2, 0.05, "undecided"),
        ("two = none within 0.1", 0.15, 0.2, "not held"),
        ("two = none within 0.1", -0.2, -0.15, "not held"),
    ],
)
def test_verdicts(folder, said, low, high, verdict):
    change(folder, expect=said)
    (e,) = spec.read_claim("toy", folder).expectations
    assert e.verdict(low, high) == verdict


def test_all_expectations_must_hold():
    assert judge.combine(["held", "held"]) == "held"
    assert judge.combine(["held", "undecided"]) == "undecided"
    assert judge.combine(["undecided", "not held", "held"]) == "not held"


def test_intervals():
    half = 4.302653 / 3**0.5
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    values = np.array([[1.0], [2.0], [3.0]])
    low, high = bootstrap_interval(values)
    assert 1 <= low < 2 < high <= 3 and bootstrap_interval(values) == (low, high)


def test_what_training_logged_can_be_judged(folder):
    """The mean of the last quarter of the steps against the first step; what some of them lack is not
    there.
    """
    log = [{"margin": float(i), **({"lr": 1.0} if i < 7 else {})} for i in range(8)]
    numbers, claim = judge.RunNumbers({}, {}, log=log), spec.read_claim("toy", folder)
    assert (
        numbers.value(claim, "two", "log.margin") == 6.5
        and numbers.value(claim, "two", "log.margin", before=True) == 0
    )
    with pytest.raises(RecipeError, match="measured no 'log.lr'"):
        numbers.value(claim, "two", "log.lr")


def test_differences_are_paired_by_seed(folder):
    change(folder, expect=["two > none by 0.05", "two > before by 0.05", "two > none by 1 in stats.moving"])
    found = {}
    for seed in range(3):  # seeds differ more than arms do
        found["two", seed] = judge.RunNumbers(
            {"loss": seed - 1.0}, {"loss": seed + 0.1 + 0.001 * seed}, {"moving": 5}
        )
        found["none", seed] = judge.RunNumbers({"loss": 9.0}, {"loss": float(seed)}, {"moving": 1})
    judged = judge.judge(spec.read_claim("toy", folder), found)
    assert [e["verdict"] for e in judged] == ["held"] * 3
    assert (
        judged[0]["difference"] == pytest.approx(0.101)
        and judged[1]["before"] == [-1, 0, 1]
        and judged[2]["difference"] == 4
    )
    found = {key: judge.RunNumbers({"loss": 0.0}, {"loss": 0.0}, {"moving": 5}) for key in found}
    alike = [e["verdict"] for e in judge.judge(spec.read_claim("toy", folder), found)]
    assert alike == ["undecided"] * 3, (
        "where every run measures the same, the metric is at its floor or ceiling"
    )
    change(folder, expect=["two > none by 0.05"], metric="stats.movin")
    with pytest.raises(RecipeError, match="measured no 'stats.movin'; did you mean 'stats.moving'"):
        judge.judge(spec.read_claim("toy", folder), found)


def test_a_sweep_goes_on_beyond_its_edge():
    """By a step as large as the last one; a value that diverged is no edge."""
    assert run.at_edge({"0.1": 1.0, "0.2": 2.0}, 0.1) and not run.at_edge(
        {"0.1": 1.0, "0.2": 0, "0.4": 2}, 0.2
    )
    assert run._beyond({"0.1": 1.0, "0.2": 2.0}, 0.1) == 0.05
    assert run._beyond({"0.002": 1.0, "0.005": 0.5}, 0.005) == 0.013


def numbers_of(left, right) -> dict:
    """Runs of arms `two` and `none`, a number of `loss` for each seed."""
    numbers = {}
    for seed, (a, b) in enumerate(zip(left, right, strict=True)):
        numbers["two", seed] = judge.RunNumbers({}, {"loss": a, "accuracy": a})
        numbers["none", seed] = judge.RunNumbers({}, {"loss": b, "accuracy": b})
    return numbers


def test_a_task_without_room_decides_nothing(folder):
    change(folder, metric="accuracy", expect="two > none by 0.1")
    claim = spec.read_claim("toy", folder)
    for left, right, why in (
        ([0.01, 0.02, 0.0], [0.0, 0.01, 0.02], "at the floor"),
        ([1.0, 0.97, 0.99], [0.98, 0.99, 1.0], "at the ceiling"),
        ([0.93, 0.92, 0.94], [0.92, 0.93, 0.93], "room for 0.0733 only"),
    ):
        (judged,) = judge.judge(claim, numbers_of(left, right))
        assert judged["verdict"] == spec.UNDECIDED and why in judged["no_room"]
    (judged,) = judge.judge(claim, numbers_of([0.8, 0.9, 0.85], [0.1, 0.2, 0.15]))
    assert judged["verdict"] == spec.HOLDS


def test_the_spread_of_a_pilot_says_how_many_seeds(folder):
    change(folder, expect="two < none by 0.2")
    claim = spec.read_claim("toy", folder)
    judged = judge.judge(claim, numbers_of([1.0, 1.4, 0.8, 1.1], [1.2, 1.3, 1.2, 1.2]), judge.TWO_LOOKS)
    assert judged[0]["verdict"] == spec.UNDECIDED
    needed = judge.seeds_needed(judged, claim, 1000)
    assert needed == seeds_for(judged[0]["deviation"], 0.1, judge.TWO_LOOKS) > 8
    assert seeds_for(1.0, 2.5) == 3 and seeds_for(1.0, 1e-9, most=50) == 50


def test_rows_that_all_seeds_share_are_crossed_with_them(folder, tmp_path):
    """The interval is that of both, wider than that of seeds alone where rows differ more than seeds."""
    change(folder, metric="retention_accuracy", expect="two > none by 0.1")
    claim = spec.read_claim("toy", folder)
    assert claim.same_rows("retention_accuracy") and not claim.same_rows("loss")
    draw, numbers = np.random.default_rng(0), {}
    right = draw.random(20) < 0.6
    for seed in range(3):
        for arm, values in (("two", right | (draw.random(20) < 0.3)), ("none", right)):
            where = tmp_path / f"{arm}-{seed}"
            where.mkdir()
            by_row = {str(i): float(value) for i, value in enumerate(values)}
            text = json.dumps({"retention_accuracy": by_row})
            (where / "per_example-after.json").write_text(text, encoding="utf-8")
            mean = {"retention_accuracy": float(values.mean())}
            numbers[arm, seed] = judge.RunNumbers({}, mean, folder=where)
    (judged,) = judge.judge(claim, numbers)
    assert judged["rows"] == 20
    (tmp_path / "two-1" / "per_example-after.json").unlink()
    (by_seed,) = judge.judge(claim, numbers)
    assert "rows" not in by_seed and by_seed["difference"] == judged["difference"]


def test_what_is_measured_of_a_whole_run_is_no_number_before_it():
    numbers = judge.RunNumbers({"loss": 2.0}, {"loss": 1.0}, {"hypervolume": 0.7, "seconds": 3.0})
    assert numbers.values()["stats.hypervolume"] == 0.7
    assert not any(name.startswith("stats.") for name in numbers.values(before=True))
    summary = numbers.summary({"stats.hypervolume"})
    assert summary["stats.hypervolume"] == 0.7 and "before.stats.hypervolume" not in summary


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"metrik": "loss"}, "a claim has no key 'metrik'; did you mean 'metric'?"),
        ({"expect": "two > nine by 0.1"}, "there is no arm 'nine'; did you mean 'none'?"),
        ({"expect": "two is better"}, "'two is better' must have the form `A > B by 0.02`"),
        ({"expect": "two > two by 0"}, "compares an arm with itself"),
        ({"expect": "two > before by 0.1 in stats.seconds"}, "there is none before training"),
        ({"expect": "two = none within -0.1"}, "the tolerance must not be negative"),
        ({"metric": None, "expect": "two > none by 0"}, "has no metric"),
        ({"expect": None}, "needs `arms` and `expect`"),
        ({"select": "best loss"}, "'best loss' must be `lowest METRIC`"),
        ({"seeds": 1}, "seeds: .* greater than or equal to 2"),
        ({"row": "lisaa"}, "the paper catalogue has no 'lisaa'; did you mean 'lisa'?"),
        ({"arms": {"before": {}, "two": {}, "none": {}}}, "the arm name 'before' is reserved"),
        (
            {"arms": {"two": {"lerning_rate": 1}, "none": {}}},
            "arm two: .*'lerning_rate'; did you mean 'learning_rate'",
        ),
        ({"arms": {"two": {"learning_rate": ["x"]}, "none": {}}}, "arm two: the list under learning_rate"),
        (
            {
                "sweep": "tuner.lora_dropout",
                "arms": {"two": {"tuner": {"name": "lora", "lora_dropout": ["x"]}}, "none": {}},
            },
            "the list under tuner.lora_dropout",
        ),
        ({"arms": {"two": {"learning_rate": [-1.0]}, "none": {}}}, "arm two: recipe: learning_rate"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(folder, keys, sentence):
    change(folder, **keys)
    with pytest.raises(RecipeError, match=f"^claim toy: .*{sentence}") as error:
        spec.read_claim("toy", folder)
    assert "\n" not in str(error.value)


def test_names_and_yaml_are_checked(folder):
    with pytest.raises(RecipeError, match="no claim 'toi'; did you mean 'toy'"):
        spec.read_claim("toi", folder)
    for text, why in (("a: [", "invalid YAML"), ("- a", "mapping of `key: value`, not list")):
        (folder / "toy.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=why):
            spec.read_claim("toy", folder)


def test_what_cannot_be_tried_says_why(folder):
    change(folder, arms=None, expect=None, untestable="It needs a dishwasher.")
    said = []
    assert (
        run.reproduce("toy", folder=folder, tell=said.append)["verdict"] == "not testable here"
        and "dishwasher" in said[0]
    )
    assert "Not testable here: It needs a dishwasher." in page.page(folder)


def test_a_seed_draws_rows_for_all_arms_alike(folder):
    claim = spec.read_claim("toy", folder)
    first, second = claim.recipe("two", 3, 1e-3), claim.recipe("none", 3)
    assert first["data"] == second["data"] == {"path": "toy:style/new", "n": 8, "seed": 3}
    assert first["eval_data"]["seed"] == 3 and first["seed"] == 3 and first["learning_rate"] == 1e-3
    sweep, tests = claim.runs(2)
    assert sweep == [("two", 1000, 1e-4), ("two", 1000, 1e-2)] and tests == [
        ("two", 0),
        ("none", 0),
        ("two", 1),
        ("none", 1),
    ]


def test_any_setting_may_be_swept(folder):
    swept = {"tuner": {"name": "lora", "r": 4, "lora_dropout": [0.1, 0.5]}}
    change(folder, sweep="tuner.lora_dropout", arms={"two": swept, "none": {"tuner": "lora"}})
    claim = spec.read_claim("toy", folder)
    assert claim.runs(2)[0] == [("two", 1000, 0.1), ("two", 1000, 0.5)] and claim.sweep_values("none") == []
    assert claim.recipe("two", 0, 0.5)["tuner"] == {
        "name": "lora",
        "r": 4,
        "lora_dropout": 0.5,
    } and "learning_rate" not in claim.recipe("two", 0)
    assert claim.fingerprint() != (change(folder), spec.read_claim("toy", folder).fingerprint())[1]


@pytest.mark.parametrize("name", spec.claim_names(HOME))
def test_claims_can_be_tried(name):
    """Every arm is a recipe whose methods exist, of a judged metric that a run can have."""
    claim = spec.read_claim(name, HOME)
    assert claim.budget.endswith(".") and claim.claim.endswith(".") and "\n" not in claim.claim
    assert claim.untestable or claim.seeds >= 5
    for arm in claim.arms:
        Recipe.load(claim.recipe(arm, 0, (claim.sweep_values(arm) or [None])[0])).yaml()
    found = page.read_result(name, HOME)
    assert found is None or found["verdict"] in (
        spec.HOLDS,
        spec.FAILS,
        spec.UNDECIDED,
        spec.UNTESTABLE,
    )


def test_every_world_of_a_claim_is_drawn_by_the_runs_seed():
    recipe = spec.read_claim("noise_static_dynamic", HOME).recipe("static", 7)
    assert [part["seed"] for part in recipe["data"]] == [7, 7] and recipe["eval_data"]["seed"] == 7


def test_a_claim_without_its_model_is_skipped(folder, monkeypatch):
    """It says how the model is brought, runs nothing and writes no result."""
    monkeypatch.chdir(folder)
    change(folder, shared={**TOY["shared"], "model": spec.REAL_MODEL})
    lines = []
    result = run.reproduce("toy", folder=folder, runs=folder / "runs", tell=lines.append)
    assert result["verdict"] == spec.SKIPPED
    assert lines == [f"toy: skipped: {result['reason']}"]
    assert f"python -m luthier.toy.real {spec.REAL_MODEL}" in result["reason"]
    assert not (folder / "results").exists() and not (folder / "runs").exists()


@pytest.mark.parametrize("name", [name for name in spec.claim_names(HOME) if name.endswith("_real")])
def test_a_claim_on_the_real_model_reads_rows_beside_it(name):
    claim = spec.read_claim(name, HOME)
    for arm in claim.arms:
        keys = claim.recipe(arm, 0)
        assert keys["model"] == spec.REAL_MODEL
        for key in ("data", "eval_data"):
            source = keys[key]
            path = Path(source["path"])
            assert path.is_file() and path.parent.resolve() == HOME / "rows"


def test_results_belong_to_claims():
    assert {p.stem for p in (HOME / "results").glob("*.json")} <= set(spec.claim_names(HOME))


def test_papers_tell_who_tries_them(monkeypatch):
    monkeypatch.chdir(HOME.parents[1])
    assert "claim/lisa_vs_lora" in next(p for p in catalogue.papers() if p["row"] == "lisa")["by"]


def test_the_verb_lists_without_a_network(monkeypatch):
    monkeypatch.chdir(HOME.parents[1])
    code = (
        "import sys, contextlib, io\nfrom luthier.cli import app\nwith"
        " contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app(['claims',"
        " '--list'])\nprint([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
    said = CliRunner().invoke(app, ["claims", "lora_forgets_more"])
    assert said.exit_code == 2 and "did you mean 'lora_forgets_less'" in said.output
