"""Recipes learn what they are for, as shipped but for the small model.

A recipe learns where the mean training loss of its last fifth of steps lies below that of its first fifth, by
a twentieth and by twice the standard error of the difference; or where the held-out loss falls by a
twentieth; or where the reward of its samples rises by twice the standard error. Of a plan one of its runs
must.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml

import luthier
from helpers.paths import ROOT

PART = 0.05  # of the first value
# rewards of ten steps of eight samples are noise, and the loss of a list ends at the entropy of its scores:
# both are measured as claims, over seeds and more steps
OF_CLAIMS = ("grpo", "lipo_softmax")
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.stem not in OF_CLAIMS]


def change(values: list[float]) -> tuple[float, float, float]:
    """The mean of the first fifth, how much higher that of the last is, and the standard error of that."""
    count = max(1, len(values) // 5)
    first, last = values[:count], values[-count:]
    error = 0.0
    if count > 1:
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / count)
    return statistics.fmean(first), statistics.fmean(last) - statistics.fmean(first), error


def learned(folder: Path) -> bool:
    """Whether a finished run in this folder learned by the rule above."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    log = folder / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    )
    losses = [line["loss"] for line in lines if "loss" in line]
    rewards = [line["reward"] for line in lines if "reward" in line]
    if losses:
        first, rise, error = change(losses)
        if -rise > max(PART * abs(first), 2 * error):
            return True
    if rewards:
        _, rise, error = change(rewards)
        if rise > 2 * error > 0:
            return True
    before, after = report["before"].get("loss"), report["after"].get("loss")
    return before is not None and after is not None and after < (1 - PART) * before


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_learns(path, tmp_path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe.pop("output_dir", None)
    if recipe.get("model", "toy:lm") == "toy:lm":
        recipe["model"] = "toy:lm-small"
    luthier.tune(recipe, folder=tmp_path / "run")
    runs = [report.parent for report in (tmp_path / "run").rglob("report.json")]
    assert any(learned(run) for run in runs if (run / "metrics.jsonl").is_file())
