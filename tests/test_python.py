"""luthier from Python: the README's calls."""

from __future__ import annotations

import luthier
from helpers.rows import SUMS
from luthier.toy.tasks import names


def test_the_calls_of_the_readme(tiny, tmp_path):
    report = luthier.tune(
        model=tiny,
        data=SUMS,
        tuner="lora",
        objective="sft",
        learning_rate=1e-2,
        max_steps=20,
        dtype="float32",
        output_dir=str(tmp_path / "run"),
    )
    assert report.after["loss"] < report.before["loss"] and "retention_loss" in report.after
    tuned = luthier.load(report.folder)
    assert isinstance(tuned.generate("1+1=", max_new_tokens=4), str)
    assert set(dir(luthier)) >= {"tune", "load", "inspect", "Recipe", "Report", "RecipeError"}


def test_fewer_rows_than_a_probe_holds_are_still_of_every_skill(tmp_path):
    keys = {
        "model": "toy:lm-small",
        "data": "toy:topic/train",
        "max_steps": 1,
        "evaluate": [{"name": "forgetting", "n": 54}],
    }
    report = luthier.tune(keys, folder=tmp_path)
    assert {k.partition("/")[2] for k in report.after if "/" in k} == set(names())
