"""compression: the table has a line for each way."""

from __future__ import annotations

import pytest

import luthier
from helpers.rows import SUMS


@pytest.mark.long
def test_the_table_has_a_line_for_each_way(tiny, tmp_path):
    ways = {
        "int8": {"quantization": "int8"},
        "rtn 2": {"quantization": {"name": "rtn", "bits_per_weight": 2, "group_size": 16}},
        "awq 2": {"quantization": {"name": "awq", "bits_per_weight": 2, "group_size": 16, "init_rows": 4}},
    }
    recipe = {
        "model": tiny,
        "data": SUMS[:8],
        "eval_data": SUMS[8:12],
        "dtype": "float32",
        "plan": {"name": "compression", "ways": ways},
    }
    report = luthier.tune(recipe, folder=tmp_path / "run")
    table = {line["method"]: line for line in report.stats["table"]}
    assert list(table) == ["as it is", *ways]
    plain, eight, two = table["as it is"], table["int8"], table["rtn 2"]
    assert plain["weight_error"] == 0.0 and plain["bits_per_weight"] == 32
    assert eight["weight_error"] < 0.01 < 0.1 < two["weight_error"]
    assert 8 < eight["bits_per_weight"] < 9 and two["bits_per_weight"] == pytest.approx(2 + 32 / 16)
    assert abs(eight["perplexity"] / plain["perplexity"] - 1) < 0.01
    assert all(line["perplexity"] > 0 and line["loss"] > 0 for line in table.values())
