"""entity_prompts: words that are in common, types renamed everywhere, what is left out."""

from __future__ import annotations

import pytest
import torch

from helpers.synthesis import nobody
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.entities import pooled_f1
from luthier.methods.formats.labelled.tagged import entities_in
from luthier.methods.stages.augment.entity_prompts import EntityPrompts, word_likeness, words_of
from luthier.registry import build

DEFINITIONS = {"person": "a human being", "place": "somewhere", "team": "people who play"}


def rows_of(*sentences: str) -> list[dict]:
    """Words that begin with a capital letter are entities: A persons, B places, C teams."""
    kinds = {"A": "person", "B": "place", "C": "team"}
    raw = []
    for sentence in sentences:
        words = sentence.split()
        tags = [f"B-{kinds[word[0]]}" if word[0] in kinds else "O" for word in words]
        raw.append({"tokens": words, "tags": tags})
    return load_rows(raw).rows


def prompts(rows, **settings) -> list[dict]:
    settings = {"by": "random", "definitions": DEFINITIONS, **settings}
    return list(build("stage", {"name": "entity_prompts", **settings})(rows, nobody()))


def test_a_rare_word_outranks_a_topic():
    """Of the same vectors, the mean of a sentence prefers the topic."""
    texts = ["the keeper saw Zidane save a goal", "the striker scored a penalty", "Zidane sold the old house"]
    texts += ["the rain fell on a roof", "a cat slept in the sun", "the bread is on a table"]
    words = [words_of(text) for text in texts]
    vocabulary = sorted({word for some in words for word in some})
    index = {word: place for place, word in enumerate(vocabulary)}
    vectors = torch.randn(len(vocabulary), 64, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    topic = vectors[index["keeper"]].clone()
    for word in ("keeper", "save", "goal", "striker", "scored", "penalty"):
        vectors[index[word]] = torch.nn.functional.normalize(topic + 0.35 * vectors[index[word]], dim=0)
    (likeness,) = word_likeness(words[:1], words[1:], index, vectors)
    assert likeness.argsort(descending=True)[:2].tolist() == [1, 0]
    means = torch.stack([vectors[[index[word] for word in some]].mean(0) for some in words])
    means = torch.nn.functional.normalize(means, dim=-1)
    assert (means[1:] @ means[0]).argmax() == 0


def test_the_policy_embeds_words(roles):
    """A sentence is never its own example; the one that shares the rare word stands last."""
    support = rows_of("Anton sold a boat", "it rained in Bonn", "a boat lay in Basel", "it rained and rained")
    stage = EntityPrompts(definitions=DEFINITIONS, k=1)
    for by in ("words", "sentences"):
        stage = EntityPrompts(definitions=DEFINITIONS, k=3, by=by)
        for row in stage(support, roles):
            assert row["prompt"].count("Sentence: ") == 4
            last = row["prompt"].rpartition("Sentence: ")[2].partition("\n")[0]
            assert row["prompt"].count(f"Sentence: {last}\n") == 1
    query = rows_of("who saw Anton yesterday")
    order = EntityPrompts().orders(query, support, roles)[0]
    assert order[0] == 0


def test_types_are_renamed_everywhere_and_back():
    rows = rows_of("Ada met Bob in Bern", "Cats beat Crows", "Abel came to Basel", "Berlin is far", "rain")
    plain, renamed = prompts(rows, k=2), prompts(rows, k=2, rename=1.0)
    for before, after in zip(plain, renamed, strict=True):
        back = after["renamed"]
        assert sorted(back.values()) == sorted(DEFINITIONS) and all(name not in DEFINITIONS for name in back)
        text, answer = after["prompt"], after["completions"][0]
        for name, own in back.items():
            assert f"{name}: {DEFINITIONS[own]}" in text
            text, answer = text.replace(f"{name}:", f"{own}:"), answer.replace(f'"{name}"', f'"{own}"')
            text = text.replace(f'"{name}"', f'"{own}"')
        assert (text, answer) == (before["prompt"], before["completions"][0])
        assert entities_in(after["completions"][0]) == after["entities"]
    assert before["renamed"] == {name: name for name in DEFINITIONS}


def test_types_that_are_left_out_are_in_no_list():
    rows = rows_of(*(f"A{k} met C{k} in B{k}" for k in range(40)))
    counts = set()
    for row in prompts(rows, k=2, drop=0.5):
        kinds = {entity["type"] for entity in row["entities"]}
        assert kinds == {*row["renamed"]} and len(row["entities"]) == len(kinds)
        for name in DEFINITIONS.keys() - kinds:
            assert name not in row["prompt"].partition("Types:")[2]
        counts.add(len(kinds))
    assert counts == {1, 2, 3}
    assert pooled_f1([["x"]], [["x"]])["entity_f1"] == 1.0


def test_examples_vary_and_are_noisy():
    rows = rows_of(*(f"A{k} is in B{k % 3}" for k in range(30)))
    counts = [row["prompt"].count("Sentence: ") - 1 for row in prompts(rows, k=3, vary=True)]
    assert {*counts} == {0, 1, 2, 3}
    assert {row["prompt"].count("Sentence: ") for row in prompts(rows, k=3)} == {4}
    assert prompts(rows, k=3, vary=True) == prompts(rows, k=3, vary=True)
    assert prompts(rows, k=2, noise=1.0) != prompts(rows, k=2)
    (row,) = prompts(rows[:1], k=2, support=[{"tokens": ["Ada", "sang"], "tags": ["B-person", "O"]}])
    assert 'Sentence: Ada sang\nEntities: [["Ada", "person"]]' in row["prompt"]
    with pytest.raises(RecipeError, match="rows of `support` need"):
        prompts(rows, support=[{"prompt": "a", "completion": "b"}])
