"""judgements: every kind is written and read back; what is none is refused; orders of pairs."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.methods.stages.curate.judgements import consistency, read_judgement, swapped
from luthier.registry import build

PAIR = {"kind": "pair", "responses": ["one\n\ntwo", "three"], "verdict": "B", "explanation": "It is\nshort."}
OPEN = {"kind": "open", "responses": ["x"], "verdict": "It has no end.", "definition": "Say what it lacks."}
ROWS = [
    {"prompt": "write", "judgement": PAIR},
    {
        "prompt": "",
        "judgement": {"kind": "point", "responses": ["fine"], "verdict": "4", "criteria": "brief"},
    },
    {"prompt": "a\n\ntext", "judgement": {"kind": "class", "responses": ["so"], "verdict": "supported"}},
    {"prompt": "", "judgement": OPEN},
]


def test_every_kind_is_read_back():
    rows = [{"id": str(k), **row} for k, row in enumerate(ROWS)]
    out = list(build("stage", "judgements")(rows, None))
    for row, made in zip(ROWS, out, strict=True):
        assert read_judgement(made["prompt"], made["completions"][0]) == row
        assert made["completions"][0].startswith(f" {row['judgement']['verdict']}")
    brief = list(build("stage", {"name": "judgements", "explain": False})(rows, None))
    assert brief[0]["completions"] == [" B"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"kind": "poem"}, "none of"),
        ({"responses": ["one"]}, "2 responses"),
        ({"verdict": "first"}, "A or B"),
        ({"verdict": ""}, "a verdict"),
    ],
)
def test_what_is_no_judgement_is_refused(change, reason):
    with pytest.raises(RecipeError, match=reason):
        list(build("stage", "judgements")([{"id": "r", "prompt": "", "judgement": {**PAIR, **change}}], None))


def test_a_judge_blind_to_order_is_consistent():
    rows = []
    for k in range(20):
        judgement = {"kind": "pair", "responses": ["x" * (2 * k + 1), "y" * 20], "verdict": "AB"[k % 2]}
        rows.append({"prompt": "q", "judgement": judgement})
    assert swapped(swapped(rows[0])) == rows[0] and swapped(rows[0])["judgement"]["verdict"] == "B"

    def longest(row):
        first, second = map(len, row["judgement"]["responses"])
        return "AB"[first < second]

    assert consistency(longest, rows) == 1.0
    assert consistency(lambda row: "A", rows) == 0.0
