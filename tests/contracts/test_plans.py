"""Plans: what they ask for is legal and follows from the reports they get; a stopped plan goes on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import luthier
from helpers.plans import GOALS, ROWS, SAMPLES, played, report
from helpers.rows import SUMS
from luthier.data.load import sample_rows
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import find, helps, names
from luthier.storage import checkpoints
from luthier.train.trainer import Trainer

NEEDED = {
    "apet": {"structures": {"random": [{"name": "apet", "n": 10}], "lora": [{"name": "lora", "r": 1}]}},
    "preference_losses": {"objectives": ["sft", "dft"]},  # rows without pairs will do for these
    "projects": {"of": [{"learning_rate": 1e-4}]},  # settings without a default
    "sequence": {"acts": [{"objective": "sft"}, {"learning_rate": 1e-4}]},
    "front": {"goals": GOALS},
    "greedy_soup": {"of": [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}]},
    "learned_soup": {"of": [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}]},
}


# plans that want more of a recipe
PLAYED_ON = {"front": SAMPLES, "meet": {"stages": [{"name": "score", "reward": "exact_match"}]}}


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@pytest.fixture
def recipe(tiny):
    return Recipe.load({"model": tiny, "tuner": "lora"})


COLUMNS = {"leti": {"tests": ["assert True"]}}  # what a plan's rows have beside prompt and answer


@pytest.mark.parametrize("name", names("plan"))
def test_plans_survive_a_rehearsal_and_ask_for_legal_recipes(name, recipe):
    plan, recipe = {"name": name, **NEEDED.get(name, {})}, recipe.but(**PLAYED_ON.get(name, {}))
    rows = [{**row, **COLUMNS.get(name, {})} for row in ROWS]
    validate(recipe.but(plan=plan), rows, sample_rows)
    blank = [
        SimpleNamespace(
            folder="x", **{k: defaultdict(float) for k in ("before", "after", "metrics", "stats")}, notes=[]
        )
        for _ in range(50)
    ]
    asked, _ = played(plan, recipe, blank)
    for one in (r for some in asked for r in (some if isinstance(some, list) else [some])):
        assert one.plan is None and Recipe.load(one.yaml()).fingerprint() == one.fingerprint()
        validate(one, rows)


@pytest.mark.parametrize("kind", ["plan", "merger"])
def test_every_setting_is_explained(kind):
    assert all(said for name in names(kind) for said in helps(find(kind, name)).values())


def test_each_act_goes_on_from_the_last(recipe):
    acts = [
        {"objective": "sft"},
        {"lr": 1e-3},
        {"start": {"merge": "average", "of": "all"}, "evaluate": ["loss"]},
        {},
    ]
    asked, _ = played(
        {"name": "sequence", "acts": acts}, recipe.but(start="first"), [report(f"act-{k}") for k in range(4)]
    )
    assert [r.init_from for r in asked] == [
        "first",
        "act-0",
        {"merge": "average", "of": ["act-0", "act-1"]},
        "act-2",
    ]
    assert [r.objective for r in asked] == ["sft", "sft", None, "sft"]
    assert (
        asked[1].learning_rate == 1e-3
        and asked[2].evaluate == ["loss"]
        and asked[0].learning_rate == recipe.learning_rate
    )


@pytest.mark.parametrize(
    "acts, words",
    [
        ([], "at least one run"),
        ([{"objective": "sft"}, {"tuner": "full"}], "run 1 has another tuner .* `init_from: null`"),
        ([{"objective": "sft"}, {"tuner.r": 2}], "run 1 has another tuner"),
        ([{"start": {"merge": "average", "of": "all"}}], "run 0 merges all earlier runs"),
        ([{"objective": "sft"}, {"learning_rat": 1}], "no key 'learning_rat'"),
        ([{"start": {"merge": "averag", "of": ["a"]}}], "no merger 'averag'"),
    ],
)
def test_impossible_acts_are_refused_before_the_first_begins(recipe, acts, words):
    with pytest.raises(RecipeError, match=words):
        validate(Recipe.load(recipe, {"plan": acts}), ROWS)


def test_another_tuner_may_begin_anew(recipe):
    validate(
        recipe.but(
            plan=[{"objective": "sft"}, {"tuner": "full", "start": None}, {"tuner": "full", "lr": 1e-5}]
        ),
        ROWS,
    )


def test_acts_run_and_merge(base, tmp_path):
    """The merge act holds the mean of what the acts before it ended with, and a later act goes on from it."""
    soup = {"start": {"merge": "average", "of": "all"}, "evaluate": ["loss"]}
    plan = [{"max_steps": 2}, {"seed": 5, "max_steps": 3}, soup, {"max_steps": 0}]
    done = luthier.tune(base | {"plan": plan, "eval_data": 0.2}, folder=tmp_path)
    assert len(done.runs) == 4
    ends = [checkpoints.load(checkpoints.paths(Path(act))[-1]).tensors for act in done.runs]
    for k, merged in ends[2].items():
        assert torch.allclose(merged, (ends[0][k] + ends[1][k]) / 2, atol=1e-7) and torch.equal(
            merged, ends[3][k]
        )
    measured = luthier.Report.read(done.runs[2])
    assert measured.losses == [] and measured.after["loss"] == measured.before["loss"]
    again = luthier.tune(base | {"plan": plan, "eval_data": 0.2}, folder=tmp_path)
    assert again.runs == done.runs and [checkpoints.paths(Path(a))[-1].stat().st_mtime for a in done.runs]


STOPPED = {
    "sequence": [{"max_steps": 2}, {"max_steps": 4, "seed": 5}, {"max_steps": 1}],
    "spin": {"name": "spin", "rounds": 3, "max_new_tokens": 4},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", STOPPED)
def test_a_plan_stopped_in_its_second_act_goes_on_there(base, tmp_path, monkeypatch, name, overwrite):
    """Acts that are finished answer, even where the recipe overwrites; the broken one goes on from its
    checkpoint.
    """
    asked = base | {
        "tuner": "lora",
        "plan": STOPPED[name],
        "max_steps": 4,
        "eval_data": 0.2,
        "overwrite": overwrite,
    }
    asked |= {"data": SUMS[:24], "evaluate": ["loss"]}
    whole = luthier.tune(asked, folder=tmp_path / "whole")
    real, made, stops = Trainer.step, [], [True]

    def stepping(self):
        if stops and made.count(0) == 2 and made[-1] == 2:
            raise ZeroDivisionError(stops.pop())
        made.append(self.roles.clock.step)
        return real(self)

    monkeypatch.setattr(Trainer, "step", stepping)
    with pytest.raises(ZeroDivisionError):
        luthier.tune(asked, folder=tmp_path / "broken")
    failed = [tmp_path / "broken" / "failed.json", tmp_path / "broken" / "run-1" / "failed.json"]
    assert [json.loads(path.read_text())["code"] for path in failed] == ["crash", "crash"]
    before, made[:] = len(made), []
    resumed = luthier.tune(asked, folder=tmp_path / "broken")
    assert not any(path.exists() for path in failed), "it has gone on"
    # nothing finished is redone
    assert made[0] and before + len(made) <= 2 + sum(len(luthier.Report.read(a).losses) for a in whole.runs)
    assert (resumed.after, resumed.losses) == (whole.after, whole.losses)
    ends = [
        [checkpoints.load(checkpoints.paths(Path(a))[-1]).tensors for a in r.runs] for r in (whole, resumed)
    ]
    assert all(torch.equal(v, there[k]) for here, there in zip(*ends, strict=True) for k, v in here.items())
    made.clear()
    luthier.tune(asked, folder=tmp_path / "broken")
    assert bool(made) == overwrite  # finished: only then is it done anew, where asked to


def test_a_plan_and_a_single_run_do_not_share_a_folder(base, tmp_path):
    luthier.tune(base | {"max_steps": 1}, folder=tmp_path)
    planned = base | {"plan": [{"max_steps": 1}, {"max_steps": 2}]}
    with pytest.raises(RecipeError, match="holds a single run; set another output_dir for this plan"):
        luthier.tune(planned, folder=tmp_path)
    luthier.tune(planned | {"overwrite": True}, folder=tmp_path)
    assert luthier.tune(planned | {"overwrite": False}, folder=tmp_path).runs


def test_a_plan_of_version_0_1_answers_from_its_own_folders(base, tmp_path, monkeypatch):
    planned = base | {"plan": [{"max_steps": 1}, {"max_steps": 2}]}
    done = luthier.tune(planned, folder=tmp_path)
    for number in range(2):
        (tmp_path / f"run-{number}").rename(tmp_path / f"act-{number}")
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("all of this was finished"))
    again = luthier.tune(planned, folder=tmp_path)
    assert [Path(run).name for run in again.runs] == ["act-0", "act-1"]
    assert (again.losses, again.after) == (done.losses, done.after)
