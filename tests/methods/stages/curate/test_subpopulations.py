"""subpopulations: planted cells are recovered, a missing attribute is added, the failing slice is first."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.curate.subpopulations import slices
from luthier.registry import build

PLACES, TIMES = ("forest", "beach", "street"), ("dawn", "noon", "night")
ROWS = []
for number, (place, time) in enumerate(itertools.product(PLACES, TIMES)):
    for copy in range(3):
        text = f"a dog on the {place} at {time}, number {copy}"
        wrong = 0.9 if (place, time) == ("beach", "night") else 0.1
        ROWS.append({"id": f"{number}-{copy}", "prompt": text, "label": "dog", "wrong": wrong})


def script(without: str = ""):
    """Names the attributes whose words it meets; `without`: one that it leaves out at first."""
    whole = {"place": list(PLACES), "time": list(TIMES)}

    def reply(prompt: str, seed: int) -> str:
        if prompt.startswith("Which attribute"):
            criteria = json.loads(re.search(r"Dimensions:\n(.*)", prompt)[1])
            text = prompt.rsplit("Text:\n", 1)[1]
            return json.dumps({d: next((a for a in some if a in text), None) for d, some in criteria.items()})
        if prompt.startswith("These texts have none"):
            words = prompt.rsplit("\n\n", 1)[1]
            dimension = re.search(r"dimension (\w+)", prompt)[1]
            return json.dumps([a for a in whole[dimension] if a in words])
        return "So: " + json.dumps({d: [a for a in some if a != without] for d, some in whole.items()})

    return Scripted(reply)


def run(roles=None, **settings):
    return list(build("stage", {"name": "subpopulations", "batches": 2, **settings})(ROWS, roles or nobody()))


def rand(out) -> float:
    """The adjusted Rand index of the cells against the planted ones."""
    metrics = pytest.importorskip("sklearn.metrics")
    planted = [row["id"].split("-")[0] for row in out]
    return metrics.adjusted_rand_score(planted, [json.dumps(row["cell"]) for row in out])


def test_planted_cells_are_recovered():
    roles = nobody()
    out = run(roles, writer=script())
    assert rand(out) >= 0.95 and len(out) == len(ROWS)
    assert "9 cells of place, time" in roles.sentences[0] and "dog / place=" in roles.sentences[0]


def test_an_attribute_that_was_left_out_is_added():
    assert {row["cell"]["time"] for row in run(writer=script("night"), rounds=0)} == {"dawn", "noon", None}
    out = run(writer=script("night"))
    assert {row["cell"]["time"] for row in out} == {*TIMES} and rand(out) >= 0.95


def test_the_slice_with_errors_is_first():
    roles = nobody()
    out = run(roles, writer=script(), error="wrong")
    assert slices(out, "label", "wrong")[0] == ("dog / place=beach / time=night", pytest.approx(0.9))
    assert "highest wrong: dog / place=beach / time=night: 0.9" in roles.sentences[1]
