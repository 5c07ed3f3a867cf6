"""eda: alpha 0 is the data unchanged; each operation changes as many words, the label stays."""

from __future__ import annotations

from collections import Counter

import torch

from helpers.synthesis import nobody
from luthier.registry import build

TEXT = "the film was good and the end was not bad at all my friends liked it much\n"
ROWS = [{"id": str(k), "prompt": TEXT, "completions": ["fine"], "label": 1} for k in range(40)]
SYNONYMS = {"film": ["movie"], "good": ["fine"], "bad": ["poor"], "friends": ["pals"], "liked": ["loved"]}


def stage(**settings):
    return build("stage", {"name": "eda", "synonyms": SYNONYMS, **settings})


def test_without_alpha_the_rows_are_unchanged():
    assert list(stage(alpha=0.0)(ROWS, nobody())) == ROWS and list(stage(copies=0)(ROWS, nobody())) == ROWS
    turns = [{"id": "0", "prompt": [{"role": "user", "content": TEXT}], "completions": ["x"]}]
    assert list(stage()(turns, nobody())) == turns


def test_each_operation_changes_as_many_words():
    """Of 17 words alpha 0.2 changes three."""
    made, rng, words = stage(alpha=0.2), torch.Generator().manual_seed(0), TEXT.split()
    for _ in range(20):
        replaced = made.changed(TEXT, "replace", rng).split()
        assert sum(a != b for a, b in zip(words, replaced, strict=True)) == 3
        assert sorted(made.changed(TEXT, "swap", rng).split()) == sorted(words)
        deleted = Counter(words) - Counter(made.changed(TEXT, "delete", rng).split())
        assert sum(deleted.values()) == 3
        inserted = Counter(made.changed(TEXT, "insert", rng).split()) - Counter(words)
        assert sum(inserted.values()) == 3 and {*inserted} <= {"movie", "fine", "poor", "pals", "loved"}
        assert made.changed(TEXT, "insert", rng).endswith("\n")
    assert made.changed("one\n", "delete", rng) == made.changed("one\n", "swap", rng) == "one\n"


def test_copies_say_what_was_done():
    out = list(stage(copies=3)(ROWS, nobody()))
    copies = [row for row in out if "augmentation" in row]
    assert {row["augmentation"] for row in copies} == {"replace", "insert", "swap", "delete"}
    assert len({row["id"] for row in out}) == len(out) and all(row["completions"] == ["fine"] for row in out)
    assert {row["augmentation"] for row in stage(synonyms={})(ROWS, nobody()) if "augmentation" in row} == {
        "swap",
        "delete",
    }
