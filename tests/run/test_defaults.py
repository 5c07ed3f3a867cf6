"""The length of a run that names none, what is said of its end, and runs that began under other defaults."""

from __future__ import annotations

import luthier
from helpers.rows import SUMS
from luthier.recipe.recipe import Recipe
from luthier.run.run import perform
from luthier.storage.layout import read_log


def test_a_run_goes_on_under_the_defaults_it_began_with(tiny, tmp_path):
    recipe = {"model": tiny, "data": SUMS[:16], "evaluate": [], "eval_data": 0}
    begun = {**recipe, "num_train_epochs": 1.0, "learning_rate": 1e-3}
    assert perform(Recipe.load(begun), tmp_path / "r", stop_at=1).stats["paused_at"] == 1
    report = perform(Recipe.load(recipe), tmp_path / "r")
    assert report.stats["steps"] == 2 and read_log(tmp_path / "r")[0]["learning_rate"] == 1e-3


def test_the_end_of_a_run_is_judged(tiny, tmp_path):
    report = luthier.tune(
        model=tiny, data=SUMS[:20], evaluate=["loss"], eval_data=0.2, output_dir=tmp_path / "r"
    )
    assert report.stats["steps"] == 20  # ten epochs of sixteen rows
    assert report.stats["trend"].startswith("held-out loss at the end: it was")
    steps = [line["step"] for line in read_log(tmp_path / "r") if "eval_loss" in line]
    assert steps == [5, 10, 15]
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Held-out loss at the end" in page
