"""scorer_rows: numbers by hand, and a scorer of them that chooses better samples."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from helpers.bilinear import Bilinear
from luthier.clock import Clock
from luthier.registry import build

ROLES = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)


def test_numbers_by_hand():
    rows = [
        {"id": "a", "prompt": "p", "answer": "the cat sat", "completions": ["the cat", "", "dog"], "task": 1},
        {"id": "b", "prompt": "q", "answer": ["no", "never"], "completions": ["never"], "task": 1},
        {"id": "c", "prompt": "r", "answer": "the cat sat", "completions": ["cat sat down"], "task": 2},
    ]
    out = list(build("stage", "scorer_rows")(rows, ROLES))
    numbers = {(row["id"][0], row["texts"][1]): float(row["completions"][0]) for row in out}
    assert numbers == {
        ("a", "the cat sat"): 1.0,
        ("a", "no"): 0.0,
        ("a", "the cat"): 0.8,  # precision 1, recall 2/3
        ("a", "dog"): 0.0,
        ("b", "no"): 1.0,
        ("b", "the cat sat"): 0.0,
        ("b", "never"): 1.0,
        ("c", "the cat sat"): 1.0,  # no other row of its task
        ("c", "cat sat down"): 0.666667,
    }
    assert all("answer" in row and row["texts"][0] in "pqr" and "scores" not in row for row in out)
    same = [{**row, "task": 1} for row in rows]
    mismatched = build("stage", {"name": "scorer_rows", "mismatched": 9})(same, ROLES)
    assert sum(row["completions"] == ["0"] for row in mismatched if row["id"][0] == "a") == 2  # no, and dog


@pytest.mark.slow
def test_a_scorer_chooses_better_samples():
    """A generator that is right 4 times of 10: the scorer's choice of 8 is 20 points better, and no better
    than the best of them.
    """
    things, chance = 12, random.Random(0)
    words = [f"q{i}" for i in range(things)] + [f"a{i}" for i in range(things)]

    def samples(i: int, n: int) -> list[str]:
        return [f"a{i}" if chance.random() < 0.4 else f"a{chance.randrange(things)}" for _ in range(n)]

    rows = []
    for place in range(120):
        i = chance.randrange(things)
        rows.append({"id": str(place), "prompt": f"q{i}", "answer": f"a{i}", "completions": samples(i, 3)})
    data = list(build("stage", "scorer_rows")(rows, ROLES))
    scorer = Bilinear(words, 16)
    adam, rng = torch.optim.Adam(scorer.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    for _ in range(200):
        some = [data[i] for i in torch.randint(len(data), (32,), generator=rng).tolist()]
        errors = [scorer.value(*row["texts"]) - float(row["completions"][0]) for row in some]
        adam.zero_grad()
        torch.stack(errors).square().mean().backward()
        adam.step()
    first = best = chosen = 0
    for _ in range(200):
        i = chance.randrange(things)
        texts = samples(i, 8)
        values = [scorer.value(f"q{i}", text).item() for text in texts]
        first += texts[0] == f"a{i}"
        best += f"a{i}" in texts
        chosen += texts[max(range(8), key=values.__getitem__)] == f"a{i}"
    assert chosen > first + 40 and chosen <= best


def test_a_constant_scorer_takes_the_first():
    decoder = build("decoder", {"name": "best_of_n", "reward": {"name": "regex", "pattern": ""}})
    renderer = SimpleNamespace(answer=lambda ids: str(ids))
    assert decoder.best(SimpleNamespace(renderer=renderer), {"id": "r"}, [[3], [1], [2]]) == [3]
