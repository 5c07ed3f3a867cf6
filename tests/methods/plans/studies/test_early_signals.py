"""early_signals: the norms that runs log, phased and stacked rows, the correlation, the rule that stops."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import luthier
from helpers.plans import played, report
from helpers.rows import SUMS, recipe_of
from luthier.errors import RecipeError
from luthier.methods.plans.studies import early_signals
from luthier.methods.plans.studies.early_signals import Early, EarlySignals, lowest, rank_correlation
from luthier.recipe.recipe import Recipe
from luthier.storage import files
from luthier.storage.layout import LOG, ROWS, read_log

PLAN = {"name": "early_signals", "settings": {"small": {}, "large": {"per_device_train_batch_size": 8}}}


@pytest.mark.long
def test_the_norm_of_a_step_is_what_torch_clips_by(shallow, tmp_path, monkeypatch):
    """The norm that a run logs is what clip_grad_norm_ returns for the same gradients."""
    from luthier.train.optimizer import Chain

    step, returned = Chain.step, []

    def measured_step(self, grads):
        params = []
        for group in grads.values():
            for gradient in group.values():
                param = torch.nn.Parameter(torch.zeros_like(gradient))
                param.grad = gradient.detach().clone()
                params.append(param)
        returned.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        step(self, grads)

    monkeypatch.setattr(Chain, "step", measured_step)
    luthier.tune(recipe_of(shallow), folder=tmp_path)
    norms = [line["gradient_norm"] for line in read_log(tmp_path)]
    assert len(norms) == 6 and min(norms) > 0
    assert norms == pytest.approx(returned, rel=1e-5)


@pytest.mark.long
def test_phased_and_stacked_read_the_same_rows(shallow, tmp_path):
    rows = [{**row, "source": name} for row, name in zip(SUMS[:24], "abc" * 8, strict=True)]
    recipe = recipe_of(shallow) | {"max_steps": None, "num_train_epochs": 2, "evaluate": ["loss"]}
    plan = {**PLAN, "settings": {"one": {}}, "phases": ["a", "b"]}
    recipe |= {"data": rows, "eval_data": rows[:6], "plan": plan}
    done = luthier.tune(recipe, folder=tmp_path)
    counts = []
    for run in done.runs:
        counts.append(Counter(row["prompt"] for row in files.read_rows(tmp_path / run / ROWS)))
    stacked, first, second = counts
    assert stacked == first + second and set(stacked.values()) == {1} and len(stacked) == 16
    steps = [len(read_log(tmp_path / run)) for run in done.runs]
    assert steps[0] == steps[1] + steps[2] == 8
    (line,) = done.stats["table"]
    assert line["added by phases"] == line["phased"] - line["stacked"]


def test_the_correlation_is_that_of_scipy(tmp_path):
    """Of the early norms that runs log with their scores at the end."""
    rng = np.random.default_rng(0)
    norms, losses, scores = rng.random((8, 10)), rng.random((8, 10)), rng.integers(0, 5, 8) / 4
    reports = []
    for k in range(8):
        folder = tmp_path / str(k)
        folder.mkdir()
        lines = []
        for step in range(10):
            line = {"step": step + 1, "loss": losses[k][step], "gradient_norm": norms[k][step]}
            lines.append(line)
        files.write_rows(folder / LOG, lines)
        reports.append(report(str(folder), accuracy=scores[k]))
    settings = {str(k): {"seed": k} for k in range(8)}
    plan = {"name": "early_signals", "settings": settings, "first_steps": 4, "metric": "accuracy"}
    _, result = played(plan, Recipe.load({}), [reports])
    assert result.after["accuracy"] == scores.max()
    for label, values in (("norm", norms), ("loss", losses)):
        means = values[:, :4].mean(1)
        expected = scipy.stats.spearmanr(means, scores).statistic
        assert result.stats["early_signals"][label] == pytest.approx(expected, abs=1e-12)
    first = result.stats["table"][0]
    assert first["early gradient norm"] == pytest.approx(norms[0, :4].mean())
    assert rank_correlation([1.0, float("nan")], [1.0, 2.0]) is None


def test_what_goes_on_and_what_that_saves(monkeypatch):
    early = {name: Early(norm, 1.0) for name, norm in zip("abcd", (3.0, 1.0, float("nan"), 2.0), strict=True)}
    assert lowest(early, 0.5) == ["b", "d"] and lowest(early, 0.1) == ["b"]
    monkeypatch.setattr(early_signals, "early_of", lambda report, steps: Early(report.norm, 1.0))
    settings = {str(k): {"seed": k} for k in range(4)}
    plan = EarlySignals(settings=settings, first_steps=10, stop=True)
    recipe = Recipe.load({"max_steps": 100, "lr_scheduler_type": "constant", "warmup_steps": 0})
    play = plan.recipes(recipe)
    probes = next(play)
    assert [arm.max_steps for arm in probes] == [10] * 4
    whole = play.send([SimpleNamespace(norm=arm.seed, folder="x") for arm in probes])
    assert [(arm.seed, arm.max_steps) for arm in whole] == [(0, 100), (1, 100)]
    with pytest.raises(StopIteration) as end:
        play.send([report(str(arm.seed), loss=2.0 - arm.seed) for arm in whole])
    result = end.value.value
    assert result.folder == "1" and result.stats["early_stop"] == pytest.approx(1 - 240 / 400)
    assert [line["loss"] for line in result.stats["table"]] == [2.0, 1.0, None, None]


@pytest.mark.slow
def test_the_rule_has_the_best_of_nine_runs_and_saves_steps(tmp_path):
    settings = {}
    for rows in (1, 4, 16):
        for rate in (1e-4, 1e-3, 1e-2):
            settings[f"{rows} {rate}"] = {"per_device_train_batch_size": rows, "learning_rate": rate}
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": "toy:people/new", "n": 1200},
        "eval_data": {"path": "toy:people/new_test", "n": 100},
        "tuner": "full",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 60,
        "evaluate": ["loss"],
        "save_steps": 1000,
    }
    plan = {"name": "early_signals", "settings": settings, "first_steps": 6}
    whole = luthier.tune(recipe | {"plan": plan}, folder=tmp_path / "whole")
    stopped = luthier.tune(recipe | {"plan": {**plan, "stop": True}}, folder=tmp_path / "stop")
    table = {line["setting"]: line for line in whole.stats["table"]}
    best = min(table, key=lambda name: table[name]["loss"])
    rest = {line["setting"]: line["loss"] for line in stopped.stats["table"] if line["loss"] is not None}
    assert len(rest) == 4 and min(rest, key=rest.__getitem__) == best
    assert stopped.after["loss"] == whole.after["loss"], "the same run"
    for line in stopped.stats["table"]:
        assert line["early gradient norm"] == table[line["setting"]]["early gradient norm"], "the same steps"
    assert stopped.stats["early_stop"] > 0.3
    assert whole.stats["early_signals"]["norm"] > 0.5, "a high norm goes with a high loss at the end"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RecipeError, match="depends on the run.s length"):
        played({**PLAN, "stop": True}, Recipe.load({}), [])
    with pytest.raises(RecipeError, match="two or more"):
        EarlySignals(phases=("a",))
    with pytest.raises(RecipeError, match="leave out stop"):
        EarlySignals(phases=("a", "b"), stop=True)
