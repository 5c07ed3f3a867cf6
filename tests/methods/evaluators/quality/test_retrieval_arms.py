"""retrieval_arms: scripted models with passages that help or do not, and BM25 by its formula."""

from __future__ import annotations

import math

import pytest

from helpers.scripted import scripted_roles
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.retrieval_arms import RetrievalArms
from luthier.methods.stages.select._bm25 import BM25

FACTS = {
    name: str(100 + k) for k, name in enumerate(("ada", "bob", "cyd", "dan", "eve", "fay", "gus", "hal"))
}
ROWS = [
    {
        "id": name,
        "prompt": f"what has {name}?",
        "answer": value,
        "context": f"It is said that {name} has {value}.",
    }
    for name, value in FACTS.items()
]


def model(memory):
    """Answers from a passage about the one asked for, else from memory."""

    def script(text, _):
        name = text.rpartition("what has ")[2].rstrip("?")
        _, there, behind = text.rpartition("what has ")[0].partition(f"{name} has ")
        return behind.partition(".")[0] if there else memory.get(name, "unknown")

    return scripted_roles(script)


def arms(folder, memory, rows=ROWS, **settings):
    """Metrics of a base model that remembers nothing, and of the tuned one."""
    evaluator = RetrievalArms(**settings)
    before = evaluator.run(model({}), rows, folder, "before")
    return before, evaluator.run(model(memory), rows, folder, "after")


def test_four_arms(tmp_path):
    half = dict(list(FACTS.items())[:4])
    before, after = arms(tmp_path, half)
    assert (before["closed_book"], before["open_book"]) == (0.0, 1.0)
    assert (after["closed_book"], after["open_book"]) == (0.5, 1.0)
    assert after["retrieval_interaction"] == -0.5  # both bring the same facts
    assert after["retrieval_interaction_low"] < -0.5 < after["retrieval_interaction_high"] < 0.05
    assert "retrieval_interaction" not in before


def test_no_interaction_where_none_is_planted(tmp_path):
    _, after = arms(tmp_path, {})
    assert after["retrieval_interaction"] == 0.0
    assert after["retrieval_interaction_low"] < 0 < after["retrieval_interaction_high"]


def test_a_retriever_that_finds_nothing(tmp_path):
    half = dict(list(FACTS.items())[:4])
    rows = [{**row, "context": "Nothing is said of that."} for row in ROWS]
    before, after = arms(tmp_path, half, rows)
    assert before["open_book"] == before["closed_book"] and after["open_book"] == after["closed_book"] == 0.5
    with pytest.raises(RecipeError, match="needs {context}"):
        RetrievalArms(template="{prompt}")


def test_documents_are_retrieved(tmp_path):
    documents = ["Of weather nothing is known.", *(row["context"] for row in ROWS)]
    rows = [{k: v for k, v in row.items() if k != "context"} for row in ROWS]
    before, _ = arms(tmp_path, {}, rows, documents=documents)
    assert before["open_book"] == 1.0


def test_bm25_by_its_formula():
    documents = ["a b b", "b c", "d d d d"]
    index = BM25(documents)
    rarity = lambda n: math.log(1 + (3 - n + 0.5) / (n + 0.5))
    length = 1.5 * (0.25 + 0.75 * 3 / 3)
    expected = rarity(1) * 2.5 * 1 / (1 + length) + rarity(2) * 2.5 * 2 / (2 + length)
    assert index.scores("A b z")[0] == pytest.approx(expected)
    assert index.top("c", 2) == [1, 0] and index.top("d", 1) == [2] and BM25([]).top("a", 3) == []
