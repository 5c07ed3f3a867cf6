"""Published pipelines: how their rows are named, and each at toy scale."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import luthier
from helpers.objectives import batch_of, cast, pair_rows
from luthier.cli import app
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.recipe import catalogue
from luthier.recipe.published import FOLDER, find_published, merge, published
from luthier.recipe.recipe import Recipe
from luthier.registry import build

GREEDY = {"name": "generate", "n": 40, "max_new_tokens": 24}


def tune(name: str, path: Path, **changes):
    """A pipeline at toy scale, measured by what is named in the changes alone."""
    return luthier.tune(Recipe.load(f"recipe:{name}", {"evaluate": ["loss"], **changes}), folder=path)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", published())
def test_a_pipeline_reads_what_it_says(name):
    pipeline = find_published(name)
    comment = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert comment.startswith("# ") and pipeline.title and pipeline.covers and pipeline.omits
    assert catalogue.paper_page(pipeline.row), "its paper is in the catalogue"
    text = json.dumps(pipeline.recipe)
    for kind in pipeline.rows:
        assert f'"rows:{kind}"' in text, f"nothing reads {kind}"
    recipe = Recipe.load(f"recipe:{name}", ["data=toy"])
    written = json.dumps(recipe.written(), default=str)
    assert recipe.model == pipeline.recipe["model"] and '"rows:' not in written
    assert Recipe.load(f"recipe:{name}").model.startswith("toy:")


def test_rows_of_a_folder_or_one_by_one(tmp_path):
    for kind in ("sft", "preference", "prompts"):
        (tmp_path / f"{kind}.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match=r"missing:\n  tests: questions of the benchmarks"):
        Recipe.load("recipe:tulu-3", {"model": "m", "data": str(tmp_path)})
    changes = {"model": "m", "data": str(tmp_path), "data.tests": "t.jsonl", "seed": 3}
    recipe = Recipe.load("recipe:tulu-3", changes)
    assert recipe.model == "m" and recipe.seed == 3
    assert recipe.plan[1]["data"] == str(tmp_path / "preference.jsonl")
    assert recipe.plan[0]["stages"][0]["against"] == "t.jsonl"
    one = Recipe.load("recipe:tulu-1", {"model": "m", "data": "rows.jsonl"})
    assert one.data == "rows.jsonl" and one.learning_rate == 2e-5


def test_what_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="no published recipe 'tulu3'.*tulu-3"):
        Recipe.load("recipe:tulu3")
    with pytest.raises(RecipeError, match="must be a folder with a file for each"):
        Recipe.load("recipe:tulu-3", {"model": "m", "data": "rows.jsonl"})
    with pytest.raises(RecipeError, match="reads 1 kinds of rows; missing"):
        Recipe.load("recipe:tulu-1", {"model": "m"})


def test_changes_of_the_same_shape():
    value = {"a": 1, "reward": {"name": "x", "k": 2}, "plan": [{"n": 1}, {"n": 2}]}
    changed = merge(value, {"reward": {"name": "y"}, "plan": [{}, {"m": 3}]})
    assert changed == {"a": 1, "reward": {"name": "y"}, "plan": [{"n": 1}, {"n": 2, "m": 3}]}
    assert value["plan"][1] == {"n": 2}


def test_the_command_line_takes_its_name():
    result = CliRunner().invoke(app, ["explain", "recipe:tulu-1", "seed=5"])
    assert result.exit_code == 0 and "toy:lm-small" in result.output


# --------------------------------------------------------------------------------------------- pipelines


def test_length_normalised_dpo_is_dpo_with_a_smaller_beta():
    rows = pair_rows()
    for row in rows:  # all completions of one length
        row["completions"] = [(completion * 3)[:3] for completion in row["completions"]]
    losses = []
    for spec in ({"name": "sigmoid_norm", "beta": 5.0}, {"name": "dpo", "beta": 5.0 / 3}):
        losses.append(build("objective", spec).loss(cast(), batch_of(rows)))
    torch.testing.assert_close(losses[0], losses[1])


def test_the_reward_is_ten_or_nothing():
    stages = find_published("tulu-3").recipe["plan"][2]["online_stages"]
    row = {"id": "1", "prompt": "2+2?", "answer": "4", "completions": ["2+2=4", "it is 5"]}
    judge = build("reward", stages[1]["reward"])
    assert judge.scores(row, row["completions"]) == [10.0, 0.0]
    penalty = build("stage", {**stages[2], "max_new_tokens": 4})
    ended, cut = [1, 2, 3], [1, 2, 3, 4]
    (scored,) = penalty([{"completions": [ended, cut], "scores": [10.0, 0.0]}], None)
    assert scored["scores"] == [10.0, -10.0]


@pytest.mark.slow
@pytest.mark.long
def test_tulu_3_at_toy_scale(tmp_path):
    reward = {"name": "regex", "pattern": "sweetly"}
    measure = {**GREEDY, "reward": reward}
    held_out = {"path": "toy:style/short_test", "n": 40}
    report = tune("tulu-3", tmp_path, evaluate=[measure], eval_data=held_out)
    assert len(report.runs) == 3
    assert report.after["generated_reward"] > report.before["generated_reward"] + 0.1


@pytest.mark.slow
@pytest.mark.long
def test_tulu_1_each_skill_is_best_at_its_own_and_the_mixture_on_average(tmp_path):
    skills = ("language/new", "style/new", "arithmetic/new")
    mixture = []
    for skill in skills:
        mixture.append({"path": f"toy:{skill}", "n": 100})
    held_out = [load_rows({"path": f"toy:{skill}_test", "n": 30}).rows for skill in skills]
    losses = {}
    for name, rows in {**dict(zip(skills, mixture)), "mixture": mixture}.items():
        place = tmp_path / name.replace("/", "-")
        changes = {**find_published("tulu-1").toy, "data.mixture": rows, "max_steps": 30, "evaluate": []}
        run = tune("tulu-1", place, **changes)
        model = luthier.load(run.folder)
        losses[name] = [-model.logprobs(rows).mean().item() for rows in held_out]
    for place, skill in enumerate(skills):
        column = [values[place] for name, values in losses.items() if name != "mixture"]
        assert losses[skill][place] == min(column)
    average = {name: sum(values) / 3 for name, values in losses.items()}
    assert min(average, key=average.get) == "mixture"


@pytest.mark.slow
@pytest.mark.long
def test_analogseeker_stays_nearer_to_the_start(tmp_path):
    rows = load_rows({"path": "toy:language/new", "n": 60}).rows
    others = load_rows({"path": "toy:word_problems/test", "n": 30}).rows
    start = luthier.load("toy:lm-small")
    change = {}
    for weight in (0.0, 0.1, 50.0):
        objective = ["sft", {"name": "kl", "weight": weight}]
        run = tune("analogseeker", tmp_path / str(weight), objective=objective, max_steps=20, evaluate=[])
        model = luthier.load(run.folder)
        own, other = (model.logprobs(some) - start.logprobs(some) for some in (rows, others))
        change[weight] = own.abs().mean().item(), other.mean().item()
    assert change[50.0][0] < 0.4 * change[0.0][0], "a heavy term holds it at the start"
    assert change[0.0][1] < change[0.1][1] < 0, "the old domain is forgotten less"
    plain = tune("analogseeker", tmp_path / "sft", objective="sft", max_steps=20, evaluate=[])
    same = luthier.load(plain.folder).logprobs(rows) - luthier.load(str(tmp_path / "0.0")).logprobs(rows)
    assert same.abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.long
def test_open_bezoar_goes_on_from_run_to_run(tmp_path):
    report = tune("open-bezoar", tmp_path, max_steps=3)
    assert len(report.runs) == 5
    for before, after in zip(report.runs, report.runs[1:]):
        recipe = Recipe.load(Path(after) / "recipe.yaml")
        assert Path(recipe.init_from) == Path(before)
    lines = (Path(report.runs[4]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(line for line in map(json.loads, lines) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3), "the policy is its own reference"
    chosen = json.loads((Path(report.runs[3]) / "report.json").read_text(encoding="utf-8"))
    assert chosen["after"]["loss"] < chosen["before"]["loss"]


@pytest.mark.slow
@pytest.mark.long
def test_okapi_rises_by_its_own_reward_model(tmp_path):
    report = tune("okapi", tmp_path, eval_data={"path": "toy:style/warm_test", "n": 40})
    judge = {"name": "reward_model", "model": report.runs[1]}
    pairs = load_rows({"path": "toy:style/warm_test", "n": 40}).rows
    scores = [build("reward", judge).scores(row, row["completions"]) for row in pairs]
    assert sum(best > worst for best, worst in scores) > 0.8 * len(pairs)
    means = []
    for run in (report.runs[0], report.runs[2]):
        model = luthier.load(run)
        answers = [model.generate(row["prompt"], max_new_tokens=24, temperature=1.0, seed=3) for row in pairs]
        given = [build("reward", judge).scores(row, [text])[0] for row, text in zip(pairs, answers)]
        means.append(sum(given) / len(given))
    assert means[1] > means[0]
