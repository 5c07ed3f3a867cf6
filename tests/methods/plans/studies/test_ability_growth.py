"""ability_growth: planted saturation, nested sets and the transfer matrix, a mix by the curves."""

from __future__ import annotations

import math

import pytest

from helpers.plans import played, report
from helpers.synthesis import nobody
from luthier.methods.plans.studies.ability_growth import allocation, saturation, slope
from luthier.registry import build

SIZES = (1, 4, 16, 64, 256, 1024)


def curve(n: float, planted: float, height: float) -> float:
    """Rises by the logarithm of rows up to where it is planted to saturate."""
    return 0.2 + height * min(1.0, math.log(1 + n) / math.log(1 + planted))


def test_a_planted_saturation_is_recovered():
    for planted in (4, 16, 64, 256):
        scores = [curve(n, planted, 0.5) for n in SIZES]
        assert saturation(SIZES, scores, 0.2) == planted
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx(2)


def test_sets_are_nested_and_the_table_is_the_transfer_matrix(recipe):
    def answer(ability: str, n: int):
        own, other = curve(n, 64, 0.6), curve(n, 64, 0.1)
        scores = {name: own if name == ability else other for name in ("a", "b")}
        made = report("x", **{f"source_accuracy/{name}": value for name, value in scores.items()})
        made.before = {"source_accuracy/a": 0.2, "source_accuracy/b": 0.2}
        return made

    plan = {"name": "ability_growth", "abilities": ["a", "b"], "sizes": [4, 64, 256]}
    cells = [(name, n) for name in "ab" for n in (4, 64, 256)]
    requests, best = played(plan, recipe, [[answer(*cell) for cell in cells]])
    rows = [{"id": f"{name}{k}", "prompt": "", "source": name} for name in "ab" for k in range(300)]
    smaller: set = set()
    for one, (name, n) in zip(requests[0], cells, strict=True):
        ids = {row["id"] for row in build("stage", one.stages[0])(rows, nobody())}
        assert len(ids) == n and all(i.startswith(name) for i in ids)
        smaller = ids if n == 4 else smaller
        assert smaller <= ids
    for line in best.stats["table"]:
        own, other = line[line["ability"]], line["ab".replace(line["ability"], "")]
        assert own > other
    assert [line["saturation"] for line in best.stats["growth"]] == [64, 64]


def test_a_mix_by_the_curves_is_no_worse_than_equal_parts():
    """One ability saturates at once, one grows on: few rows for the first, and a better mean."""
    heights = {"soon": (4, 0.3), "late": (1024, 0.6), "never": (1024, 0.0)}
    curves = {name: [curve(n, *shape) for n in SIZES] for name, shape in heights.items()}
    base = dict.fromkeys(curves, 0.2)
    for budget in (10, 60, 300, 900):
        counts = allocation(SIZES, curves, base, budget)
        mean = lambda mix: sum(curve(n, *heights[name]) for name, n in mix.items())  # noqa: E731
        assert sum(counts.values()) == budget
        assert mean(counts) >= mean(dict.fromkeys(curves, budget // 3))
    assert counts["late"] > 100 * counts["never"] and counts["soon"] < 10
