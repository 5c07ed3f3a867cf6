"""bits_per_byte: are those of the text."""

from __future__ import annotations

import json
import math

import pytest

import luthier


def test_bits_per_byte_are_those_of_the_text(base, tmp_path):
    report = luthier.tune(
        {**base, "eval_data": 0.3, "evaluate": ["loss", "bits_per_byte"], "max_steps": 1},
        folder=tmp_path / "a",
    )
    by_row = (
        json.loads((tmp_path / "a" / "per_example-before.json").read_text())
        if (tmp_path / "a" / "per_example-before.json").is_file()
        else None
    )
    assert report.before["bits_per_byte"] > 0 and (by_row is None or len(by_row["loss"]) > 3)
    # a byte is a token here, but for the end of turn, which is asked and says nothing
    tokens = report.before["loss"] / math.log(2)
    assert report.before["bits_per_byte"] == pytest.approx(tokens * 1.7, rel=0.4)
