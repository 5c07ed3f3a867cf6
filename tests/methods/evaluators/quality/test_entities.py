"""entities: F1 of spans as seqeval has it, lists and the way back, tagged rows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from helpers.synthesis import nobody
from luthier.data.load import load_rows
from luthier.methods.evaluators.quality.entities import pairs, pooled_f1
from luthier.methods.formats.labelled.tagged import entities_in, listed, spans_of
from luthier.registry import build


def chunks(tags: list[str]) -> set[tuple[str, int, int]]:
    """conlleval's two questions, word by word: does a chunk end before this word, does one begin with it?"""
    out, begin = set(), 0
    before, kind_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag[2:]
        ends = before in "ES" or (before in "BI" and (prefix in "BSO" or kind != kind_before))
        begins = prefix in "BS" or (prefix in "EI" and (before in "ESO" or kind != kind_before))
        if before != "O" and ends:
            out.add((kind_before, begin, place))
        if begins:
            begin = place
        before, kind_before = prefix, kind
    return out


def random_tags(draw: random.Random, count: int) -> list[str]:
    """Of a scheme or not, as models write them."""
    tags = []
    for _ in range(count):
        prefix = draw.choice("BIOOES")
        tags.append("O" if prefix == "O" else f"{prefix}-{draw.choice(('person', 'place'))}")
    return tags


def test_f1_of_spans_is_that_of_seqeval():
    """Tags of any scheme, broken ones among them; and the same for the pairs that lists are of."""
    for seed in range(100):
        draw = random.Random(seed)
        sizes = [draw.randint(1, 12) for _ in range(4)]
        true, predicted = ([random_tags(draw, size) for size in sizes] for _ in range(2))
        right = sum(len(chunks(a) & chunks(b)) for a, b in zip(true, predicted))
        total = sum(len(chunks(tags)) for tags in [*true, *predicted])
        rates = pooled_f1(map(spans_of, true), map(spans_of, predicted))
        assert rates["entity_f1"] == pytest.approx(2 * right / max(1, total))
        tables = []
        for some in (true, predicted):
            raw = [{"tokens": [f"w{k}" for k in range(len(tags))], "tags": tags} for tags in some]
            tables.append([pairs(row["entities"]) for row in load_rows(raw).rows])
        assert pooled_f1(*tables) == pytest.approx(rates)


def test_rates_by_hand():
    rates = pooled_f1([["a", "a", "b"], []], [["a", "c"], ["d"]])
    assert rates == pytest.approx({"entity_f1": 2 / 6, "entity_precision": 1 / 3, "entity_recall": 1 / 3})
    assert pooled_f1([[]], [[]])["entity_f1"] == 0.0


def test_lists_and_the_way_back():
    entities = [{"text": 'the "Owl"', "type": "place"}, {"text": "Żaba", "type": "person"}]
    assert entities_in(f"Entities: {listed(entities)} and more") == entities
    assert entities_in(" []") == []
    assert [entities_in(text) for text in ("none", "[1, 2]", '[["a"', '[["a", "b", "c"]]')] == [None] * 4


def test_rows_with_tags():
    (row,) = load_rows([{"tokens": ["Ann", "Lee", "sings"], "ner_tags": ["B-person", "I-person", "O"]}]).rows
    assert row["prompt"] == "Ann Lee sings\n" and row["completions"] == ['[["Ann Lee", "person"]]']
    again = {"sentence": "Ann Lee sings", "entities": row["entities"]}
    assert load_rows([again]).rows[0]["completions"] == row["completions"]
    raw = [{"tokens": ["a"], "tags": [3]}, {"tokens": ["a"], "tags": []}, {"tokens": ["a"], "tags": ["O"]}]
    bad = load_rows(raw, max_bad_rows=1.0).bad
    assert "must be names" in bad[0]["reason"] and "same length" in bad[1]["reason"]


def test_answers_are_measured(tmp_path):
    tables = ((["Ann", "sings"], ["B-person", "O"]), (["it", "rains"], ["O", "O"]))
    rows = load_rows([{"tokens": words, "tags": tags} for words, tags in tables]).rows
    answers = ['[["Ann", "person"]]', "nothing"]
    roles = nobody()
    roles.renderer = SimpleNamespace(prompt=lambda row: [1], stop_ids=[0], answer=lambda ids: answers[ids[0]])
    roles.policy = SimpleNamespace(generate=lambda prompts, **how: [[[k]] for k in range(len(prompts))])
    measured = build("evaluator", "entities").run(roles, rows, tmp_path, "after")
    assert measured["entity_f1"] == 1.0 and measured["readable_lists"] == 0.5
    prompts = {"name": "entity_prompts", "by": "random", "k": 1, "rename": 1.0}
    measured = build("evaluator", {"name": "entities", "prompts": prompts}).run(
        roles, rows, tmp_path, "after"
    )
    assert measured["entity_f1"] == 0.0, "the type has another name there"
