"""What a run is doing now, as it writes it for others."""

from __future__ import annotations

import json

from luthier.report.console import Callback
from luthier.report.status import StatusFile


def read(folder):
    return json.loads((folder / "status.json").read_text())


def test_steps_and_what_is_done_meanwhile_come_from_one_file(tmp_path):
    status = StatusFile(Callback(), tmp_path)
    with status.working("evaluating before training") as progress:
        assert read(tmp_path)["doing"] == "evaluating before training"
        status.written = float("-inf")
        progress(3, 16, "rows")
        assert (read(tmp_path)["done"], read(tmp_path)["of"], read(tmp_path)["unit"]) == (3, 16, "rows")
    with status.training(80, 10):
        status.written = float("-inf")
        status.step({"step": 12})
        now = read(tmp_path)
        assert (now["doing"], now["step"], now["steps"]) == ("training", 12, 80) and now["left"] > 0
        with status.working("evaluating during training"):
            now = read(tmp_path)
            assert (now["doing"], now["step"]) == ("evaluating during training", 12)
        assert read(tmp_path)["doing"] == "training"
        status.step({"step": 80})
    assert read(tmp_path)["step"] == 80 and read(tmp_path)["left"] == 0


def test_everything_is_handed_on_and_a_folder_that_is_gone_stops_nothing(tmp_path):
    heard = Callback()
    status = StatusFile(heard, tmp_path / "gone")
    status.warn("careful")
    status.stage("saving")
    assert heard.notes == status.notes == ["careful"] and not (tmp_path / "gone").exists()
