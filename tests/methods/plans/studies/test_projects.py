"""projects: compare ways."""

from __future__ import annotations

import pytest

import luthier
from helpers.rows import recipe_of


@pytest.mark.slow
@pytest.mark.long
def test_projects_compare_ways(shallow, tmp_path):
    """Three projects of their own words: every way learns, all weights most; cheaper ways cost fewer
    operations and bytes.
    """
    words = ["kelo", "tarn", "mipu"]
    data = [
        [{"prompt": f"{a}+{b}:", "completion": f"{w}{w[::-1]}"} for a in range(4) for b in range(4)]
        for w in words
    ]
    recipe = recipe_of(shallow) | {"evaluate": ["loss", "cost"], "max_steps": 12, "learning_rate": 3e-3}
    recipe.pop("data"), recipe.pop("eval_data")
    of = [{"data": rows, "eval_data": rows} for rows in data]
    ways = [
        "full",
        {"name": "part", "part": "embeddings"},
        "part",
        {"tuner": {"name": "prompt", "num_virtual_tokens": 8}, "learning_rate": 0.1},
    ]
    luthier.tune(**recipe, plan={"name": "projects", "of": of, "ways": ways}, output_dir=str(tmp_path))
    from luthier.run.run import Report

    reports = [Report.read(tmp_path / f"run-{i}") for i in range(12)]
    for project in (reports[i : i + 4] for i in range(0, 12, 4)):
        loss = [r.after["loss"] for r in project]
        assert all(r.after["loss"] < r.before["loss"] for r in project) and min(loss) == loss[0]
        flops, stored = [[r.after[k] for r in project] for k in ("gflops_per_row", "stored_mb")]
        assert flops[2] < flops[0] and stored[0] > max(stored[1:])
        assert [r.stats["moving"] * 4 / 2**20 for r in project] == pytest.approx(stored)
