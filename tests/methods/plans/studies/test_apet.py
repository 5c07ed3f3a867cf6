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
    play = plan.recipes(recipe)

    def answer(one):
        if one.tuner == "full":
            after = 1.0
        else:
            size = one.tuner.get("n") or 10 * one.tuner["r"]
            after = 0.3 + size / 200 + (one.tuner["name"] == "lora") * (0.2 if one.model == "small" else 0.1)
        moving = {} if one.tuner == "full" else {"moving": size}
        report = SimpleNamespace(
            folder="x", before={"accuracy": 0.3}, after={"accuracy": after}, stats=moving, notes=[]
        )
        return report

    request = next(play)
    try:
        while True:
            request = play.send(
                [answer(r) for r in request] if isinstance(request, list) else answer(request)
            )
    except StopIteration as end:
        best = end.value
    rows = {(line["model"], line["structure"]): line for line in best.stats["table"]}
    assert (
        rows["small", "random"]["low threshold"] == 10 and rows["small", "random"]["high threshold"] is None
    )
    assert rows["small", "lora"]["high threshold"] == 100 and rows["large", "lora"]["high threshold"] == 100
    spread = {(line["model"], line["size"]): line["range"] for line in best.stats["spread"]}
    assert spread["small", 1] == pytest.approx(0.2) and spread["large", 2] == pytest.approx(0.1)
    assert len(best.notes) == 4 and best.after["accuracy"] == 1.0
