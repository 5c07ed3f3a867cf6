"""context_pairs: a context flips the pair, and a reward model is right with its context alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from helpers.bilinear import Bilinear
from luthier.clock import Clock
from luthier.registry import build

ROLES = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
TRAITS = ["short", "formal", "funny", "detailed", "polite", "direct"]
WORDS = [*TRAITS, *(f"wants-{trait}" for trait in TRAITS), *(f"topic{i}" for i in range(8)), "good", "bad"]


def test_a_context_flips_the_pair():
    row = {"id": "a", "prompt": "Q", "contexts": ["x", "y"], "completions": ["one", "two"]}
    chat = {**row, "id": "b", "prompt": [{"role": "user", "content": "Q"}]}
    plain = {"id": "c", "prompt": "P", "completions": ["u", "v"], "scores": [1.0, 0.0]}
    odd = {"id": "d", "prompt": "P", "completions": ["u"], "contexts": ["x"]}
    out = list(build("stage", "context_pairs")([row, chat, plain, odd], ROLES))
    assert [(r["prompt"], r["completions"]) for r in out[:2]] == [
        ("x\n\nQ", ["one", "two"]),
        ("y\n\nQ", ["two", "one"]),
    ]
    assert out[2]["prompt"] == [{"role": "user", "content": "x\n\nQ"}] and out[4] is plain and len(out) == 5
    assert all(r["scores"] == [1.0, 0.0] and "contexts" not in r for r in out[:4])
    with pytest.raises(Exception, match="prompt"):
        build("stage", {"name": "context_pairs", "template": "{context}"})


def flips(count: int, seed: int) -> list[dict]:
    chance, rows = random.Random(seed), []
    for place in range(count):
        one, two = chance.sample(TRAITS, 2)
        row = {"id": str(place), "prompt": f"topic{chance.randrange(8)}", "completions": [one, two]}
        rows.append({**row, "contexts": [f"wants-{one}", f"wants-{two}"]})
    return rows


def ordinary(count: int, seed: int) -> list[dict]:
    chance, rows = random.Random(seed), []
    for place in range(count):
        texts = [f"{quality} {chance.choice(TRAITS)}" for quality in ("good", "bad")]
        row = {"id": f"o{place}", "prompt": f"topic{chance.randrange(8)}", "completions": texts}
        rows.append({**row, "scores": [1.0, 0.0]})
    return rows


@pytest.mark.slow
def test_only_with_its_context_it_judges_right():
    stage = build("stage", "context_pairs")
    held, plain = list(stage(flips(100, 1), ROLES)), ordinary(200, 2)
    aware = Bilinear(WORDS).learn(list(stage(flips(200, 0) + ordinary(200, 0), ROLES)), steps=250)
    blind = [{**row, "prompt": row["prompt"].split("\n\n")[-1]} for row in held]
    assert aware.accuracy(held) > 0.9
    assert 0.45 <= aware.accuracy(blind) <= 0.55  # each pair stands there twice, with opposite labels
    unaware = Bilinear(WORDS).learn(ordinary(200, 0), steps=250)
    assert unaware.accuracy(blind) == 0.5
    assert abs(aware.accuracy(plain) - unaware.accuracy(plain)) < 0.02
