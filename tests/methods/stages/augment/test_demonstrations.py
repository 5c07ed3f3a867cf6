"""demonstrations: the best by the formula, the limit of length, and a model that copies."""

from __future__ import annotations

import math
import random

import pytest

from luthier.errors import RecipeError
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Texts of common words and one of twenty topics, which its answer names."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        topic = f"topic{rng.randrange(20)}"
        words = [rng.choice("abcdefgh") for _ in range(6)]
        words[rng.randrange(6)] = topic
        rows.append({"id": str(i), "prompt": f"{i} {' '.join(words)}", "completions": [f"of {topic}"]})
    return rows


def with_demonstrations(rows, **settings) -> list[dict]:
    return list(build("stage", {"name": "demonstrations", **settings})(rows, DryRunRoles()))


def test_they_are_the_best_by_the_formula():
    """Against BM25 written out, over 100 documents; the row itself is never among them, the best is last."""
    rows = rows_of(100)
    documents = [row["prompt"].split() for row in rows]
    mean = sum(map(len, documents)) / 100

    def score(query, document):
        total = 0.0
        for word in query:
            n = sum(word in other for other in documents)
            f = document.count(word)
            part = f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
            total += math.log(1 + (100 - n + 0.5) / (n + 0.5)) * part
        return total

    for place, row in list(enumerate(with_demonstrations(rows, k=3)))[:20]:
        scores = [round(score(documents[place], document), 9) for document in documents]
        order = sorted((k for k in range(100) if k != place), key=lambda k: (-scores[k], k))[:3]
        expected = "".join(f"{rows[k]['prompt']}\n{rows[k]['completions'][0]}\n\n" for k in reversed(order))
        assert row["prompt"] == expected + rows[place]["prompt"]
        assert row["completions"] == rows[place]["completions"]


def test_the_least_alike_leave_first():
    rows = rows_of(40)
    whole, short = (with_demonstrations(rows, k=4, letters=n) for n in (10_000, 120))
    for long_row, row, plain in zip(whole, short, rows, strict=True):
        assert len(row["prompt"]) <= 120 and long_row["prompt"].endswith(row["prompt"])
        assert row["prompt"].endswith(plain["prompt"])
    assert any(len(row["prompt"]) < len(other["prompt"]) for row, other in zip(short, whole, strict=True))
    assert [row["prompt"] for row in with_demonstrations(rows, k=0)] == [row["prompt"] for row in rows]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a b"}]
    (one, _) = with_demonstrations([{"id": "t", "prompt": turns, "completions": ["x"]}, rows[0]], k=1)
    assert one["prompt"][0] == turns[0] and one["prompt"][1]["content"].endswith("\n\na b")
    with pytest.raises(RecipeError, match="needs {prompt}"):
        with_demonstrations(rows, template="{prompt}")


def test_a_model_that_copies_gains_by_near_ones():
    """One that repeats the last demonstration's answer is right with near ones, and by chance with random
    ones.
    """
    rows = rows_of(200)
    rates = {}
    for choose in ("bm25", "random"):
        right = 0
        for row, plain in zip(with_demonstrations(rows, k=2, choose=choose), rows, strict=True):
            answer = row["prompt"].removesuffix(plain["prompt"]).strip().rpartition("\n")[2]
            right += answer == plain["completions"][0]
        rates[choose] = right / 200
    assert rates["bm25"] > 0.9 > 0.2 > rates["random"]
