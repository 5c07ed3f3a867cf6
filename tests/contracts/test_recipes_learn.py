"""Recipes lower the loss of their own training rows, as shipped but for the small model.

A recipe counts as learning where the mean loss of its last fifth of steps lies below that of its first by a
fifth of a nat, or by a tenth of it where it starts below two nats.
"""

from __future__ import annotations

import pytest
import yaml

import luthier
from helpers.paths import ROOT

LEARN = {  # family -> recipes whose one training loss shows it
    "estimators/sharpness": ("ggpo", "mgpo"),
    "estimators/zeroth_order": ("mezo",),
    "optimizers/first_order": ("lion",),
    "tuners/low_rank": ("adalora", "corda", "eva", "loldu", "lora_sb"),
    "tuners/sparse": ("dsee", "lt_sft", "r_amt"),
    "tuners/subset": ("hft", "lisa", "owlore"),
}
PATHS = [ROOT / "recipes" / family / f"{name}.yaml" for family, names in LEARN.items() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_learns(path, tmp_path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if recipe.get("model", "toy:lm") == "toy:lm":
        recipe["model"] = "toy:lm-small"
    recipe["evaluate"] = []
    losses = luthier.tune(recipe, folder=tmp_path).losses
    count = max(1, len(losses) // 5)
    first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
    assert last < first - min(0.2, 0.1 * first)
