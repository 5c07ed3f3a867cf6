"""apet: thresholds are the crossings of a curve; compares structures by model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from luthier.methods.plans.studies.apet import crossing
from luthier.registry import build


def test_thresholds_are_the_crossings_of_a_curve():
    counts = [2**k for k in range(12)]
    curve = [1 - math.exp(-n / 100) for n in counts]
    for level in (0.1, 0.5, 0.9):
        exact = -100 * math.log(1 - level)
        assert crossing(counts, curve, level) == next(n for n in counts if n >= exact)
    assert crossing(counts, curve, 1.1) is None


def test_apet_compares_structures_by_model(recipe):
    structures = {
        "random": [{"name": "apet", "n": n} for n in (10, 100)],
        "lora": [{"name": "lora", "r": r} for r in (1, 10)],
    }
    plan = build(
        "plan", {"name": "apet", "structures": structures, "models": ["small", "large"], "share": 0.9}
    )

    def answer(one, before):
        if one.tuner == "full":
            after = 1.0
        else:
            size = one.tuner.get("n") or 10 * one.tuner["r"]
            after = 0.3 + size / 200 + (one.tuner["name"] == "lora") * (0.2 if one.model == "small" else 0.1)
        moving = {} if one.tuner == "full" else {"moving": size}
        report = SimpleNamespace(folder="x", before=before, after={"accuracy": after}, stats=moving, notes=[])
        return report

    def played(before):
        play = plan.recipes(recipe)
        request = next(play)
        while True:
            replies = [answer(one, before) for one in (request if isinstance(request, list) else [request])]
            try:
                request = play.send(replies if isinstance(request, list) else replies[0])
            except StopIteration as end:
                return end.value

    best = played({"accuracy": 0.3})
    rows = {(line["model"], line["structure"]): line for line in best.stats["table"]}
    assert (
        rows["small", "random"]["low threshold"] == 10 and rows["small", "random"]["high threshold"] is None
    )
    assert rows["small", "lora"]["high threshold"] == 100 and rows["large", "lora"]["high threshold"] == 100
    spread = {(line["model"], line["size"]): line["range"] for line in best.stats["spread"]}
    assert spread["small", 1] == pytest.approx(0.2) and spread["large", 2] == pytest.approx(0.1)
    assert len(best.notes) == 4 and best.after["accuracy"] == 1.0
    unmeasured = played({})
    assert {line["low threshold"] for line in unmeasured.stats["table"]} == {None}
    assert len(unmeasured.notes) == 6
