"""A run in a process of its own: what it ended with comes back as its type."""

from __future__ import annotations

import json
import sys

import pytest

from luthier.errors import NothingMoves, RecipeError
from luthier.run import subprocess


def test_a_refusal_before_the_run_has_its_folder_keeps_its_code(tmp_path):
    """Of another run's folder nothing is written, and yet the code arrives."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": "b"}) + "\n" for _ in range(8)))
    keys = {"model": "toy:lm-small", "data": str(rows), "max_steps": 0, "evaluate": [], "eval_data": 0}
    subprocess.tune(keys, tmp_path / "run")
    with pytest.raises(RecipeError, match="holds another run") as error:
        subprocess.tune({**keys, "seed": 1}, tmp_path / "run")
    assert error.value.code == "another_run"
    assert not str(error.value).startswith("luthier: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run"]


def test_a_refusal_without_a_folder_keeps_its_type(tmp_path):
    code = (
        "from luthier.errors import NothingMoves; from luthier.storage.failure import report_outcome;"
        " report_outcome(NothingMoves('no parameter is left')); raise SystemExit(2)"
    )
    with pytest.raises(NothingMoves, match="^no parameter is left$"):
        subprocess._wait_for([sys.executable, "-c", code], [tmp_path / "run"])
    with pytest.raises(RecipeError, match="exit code 3") as error:
        subprocess._wait_for(["sh", "-c", "exit 3"], [tmp_path / "run"])
    assert error.value.code == "crash"
