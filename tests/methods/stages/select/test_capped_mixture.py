"""capped_mixture: rates of tasks are those of their capped sizes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from luthier.clock import Clock
from luthier.registry import build

ROLES = SimpleNamespace(clock=Clock())


def test_rates_are_those_of_capped_sizes():
    sizes, rows = {"a": 40, "b": 400, "c": 4000}, []
    for task, size in sizes.items():
        rows += [{"id": f"{task}{k}", "prompt": "q", "completions": ["x"], "task": task} for k in range(size)]
    stage = build("stage", {"name": "capped_mixture", "cap": 200, "rows": 20_000})
    out = stage(rows, ROLES)
    capped = {task: min(size, 200) for task, size in sizes.items()}
    counts = Counter(row["task"] for row in out)
    for task, size in capped.items():
        assert counts[task] / len(out) == pytest.approx(size / sum(capped.values()), abs=0.02)
    assert out == stage(rows, ROLES) and len({row["id"] for row in out}) == len(out)
    used = Counter(row["id"].split("/")[0] for row in out if row["task"] == "a")
    assert max(used.values()) - min(used.values()) <= 1
    without = build("stage", {"name": "capped_mixture", "rows": 500, "weights": {"b": 0.0}})(rows, ROLES)
    assert {row["task"] for row in without} == {"a", "c"}
