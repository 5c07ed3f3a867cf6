"""lift: random formulas, there and back."""

from __future__ import annotations

import random

from luthier.methods.stages.curate.lift import ground
from luthier.registry import build

FIELDS = [
    {"go to the bank": "bank", "go to the bank door": "door", "open the box": "box", "wait": "wait"},
    {"valve one is shut": "v1", "valve one": "v", "the tank fills": "tank", "alarm": "alarm_on"},
]
WORDS = {"and": "&", "or": "|", "implies": "->", "until": "U"}


def tree(chance: random.Random, names: dict[str, str], depth: int) -> tuple[str, str, set[str]]:
    """A sentence, its formula, and the phrases in them."""
    if depth == 0 or chance.random() < 0.2:
        phrase = chance.choice(sorted(names))
        return f"[{phrase}]", names[phrase], {phrase}
    if chance.random() < 0.3:
        text, formula, phrases = tree(chance, names, depth - 1)
        return f"always {text}", f"G ( {formula} )", phrases
    word = chance.choice(sorted(WORDS))
    left, right = tree(chance, names, depth - 1), tree(chance, names, depth - 1)
    formula = f"( {left[1]} {WORDS[word]} {right[1]} )"
    return f"{left[0]} {word} {right[0]}", formula, left[2] | right[2]


def test_a_thousand_formulas_there_and_back():
    chance, stage, rows = random.Random(0), build("stage", "lift"), []
    for k in range(1000):
        names = FIELDS[k % 2]
        text, formula, phrases = tree(chance, names, 3)
        pairs = [[phrase, names[phrase]] for phrase in sorted(phrases)]
        rows.append({"id": str(k), "prompt": text, "completions": [formula], "propositions": pairs})
    lifted = list(stage(rows, None))
    assert len(lifted) == 1000
    for row, own in zip(rows, lifted):
        assert ground(own["completions"][0], own["propositions"]) == row["completions"][0]
        assert not any(f"[{phrase}]" in own["prompt"] for phrase, _ in row["propositions"])
        assert not any(name in own["completions"][0].split() for _, name in row["propositions"])
        for number in range(1, len(row["propositions"]) + 1):
            assert f"prop_{number}" in own["prompt"] and f"prop_{number}" in own["completions"][0]


def test_two_fields_become_one():
    stage, lifted = build("stage", "lift"), []
    for names in FIELDS:
        a, b = sorted(names)[1:3]
        row = {"id": "r", "prompt": f"[{a}] until [{b}]", "completions": [f"( {names[a]} U {names[b]} )"]}
        lifted += stage([{**row, "propositions": [[b, names[b]], [a, names[a]]]}], None)
    assert {row["prompt"] for row in lifted} == {"[prop_1] until [prop_2]"}
    assert {row["completions"][0] for row in lifted} == {"( prop_1 U prop_2 )"}
    assert ground("prop_9", [["a", "b"]]) == "prop_9"


def test_rows_that_cannot_be_lifted_leave():
    class Roles:
        class clock:
            step = first = 0

        warn = staticmethod(lambda sentence: None)

    row = {"id": "r", "prompt": "a b", "completions": ["a"]}
    bad = [
        row,
        {**row, "propositions": [["c", "c"]]},
        {**row, "prompt": "prop_1", "propositions": [["a", "a"]]},
    ]
    assert list(build("stage", "lift")(bad, Roles())) == []
