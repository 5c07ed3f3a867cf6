"""Run folders: trackers, typed outcomes, a folder that cannot be written, a full disk."""

from __future__ import annotations

import pytest

import luthier
from luthier.errors import TYPES, RecipeError, from_code


def test_trackers_hear_every_number(base, tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")
    heard = []

    class Ear(tracking.GeneralTracker):
        name, requires_logging_directory = "ear", False
        tracker = property(lambda self: self)

        def __init__(self, run_name, **how):
            super().__init__()
            heard.append(("begin", run_name))

        def store_init_configuration(self, values):
            heard.append(("recipe", values))

        def log(self, values, step=None, **how):
            heard.append((step, values))

        def finish(self):
            heard.append(("end", None))

    tracking.LOGGER_TYPE_TO_CLASS["ear"] = Ear
    try:
        report = luthier.tune(
            base | {"report_to": ["ear"], "evaluate": ["loss"], "eval_steps": 2, "logging_steps": 2},
            folder=tmp_path,
        )
    finally:
        del tracking.LOGGER_TYPE_TO_CLASS["ear"]
    assert heard[0] == ("begin", "luthier") and heard[1][0] == "recipe" and heard[-1] == ("end", None)
    assert (
        all(isinstance(v, (int, float, str)) for v in heard[1][1].values())
        and heard[1][1]["learning_rate"] == 1e-3
    )
    assert [(s, v["loss"]) for s, v in heard[2:-1] if "loss" in v] == list(
        zip((2, 4, 6), report.losses, strict=True)
    )
    assert [s for s, v in heard[2:-1] if "eval_loss" in v] == [0, 2, 4, 6]


def test_outcomes_come_back_as_their_types():
    for code, kind in TYPES.items():
        error = from_code(code, "why")
        assert type(error) is kind and str(error) == "why" and error.code == code
    assert type(from_code("of_tomorrow", "why")) is RecipeError and from_code("x", "why").code == "x"


def test_an_unwritable_folder_is_a_sentence(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written .*another output_dir"):
        luthier.tune(base, folder=tmp_path / "file" / "run")
