"""principle_pairs: labels by brute force, prompts that list them, and a reward model that reads them."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from helpers.bilinear import Bilinear
from luthier.clock import Clock
from luthier.methods.rewards.judges.option_judge import OptionJudge
from luthier.methods.stages.curate.principle_pairs import decision
from luthier.registry import build

TRAITS = ["brief", "polite", "exact", "funny"]
PRINCIPLES = {f"want-{trait}": f"avoid-{trait}" for trait in TRAITS}
LEVELS = {f"{trait}{level}": level for trait in TRAITS for level in range(4)}


def fits(self, row, texts):
    """A judge in place of the model's: by how much a text has of what its criteria want."""
    trait = self.criteria.removeprefix("want-")
    return [0.5 + (level_of(text, trait) - level_of(row["answer"], trait)) / 8 for text in texts]


def level_of(text: str, trait: str) -> int:
    return next(LEVELS[word] for word in text.split() if word.startswith(trait))


def test_the_label_is_the_surest_principles():
    chance = random.Random(0)
    for _ in range(200):
        gaps = [chance.uniform(-1, 1) for _ in range(5)]
        sample = chance.sample(range(5), 3)
        for negated in itertools.product([False, True], repeat=3):
            best, want = -1.0, 0.0
            for k, flip in zip(sample, negated, strict=True):
                if abs(gaps[k]) > best:
                    best, want = abs(gaps[k]), -gaps[k] if flip else gaps[k]
            assert decision(gaps, sample, negated) == want


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(OptionJudge, "scores", fits)

    def rows_of(count: int, seed: int, **settings) -> list[dict]:
        chance, rows = random.Random(seed), []
        for place in range(count):
            texts = [" ".join(f"{t}{chance.randrange(4)}" for t in TRAITS) for _ in range(2)]
            rows.append({"id": f"{seed}-{place}", "prompt": "q", "completions": texts})
        stage = build("stage", {"name": "principle_pairs", "principles": PRINCIPLES, **settings})
        return list(stage(rows, SimpleNamespace(clock=Clock(), warn=lambda sentence: None)))

    return rows_of


def test_rows_of_the_stage(make):
    rows = make(40, 0, draws=2)
    assert rows == make(40, 0, draws=2) and 60 < len(rows) <= 80
    for row in rows:
        assert row["prompt"].endswith("\n\nq") and 1 <= len(row["principles"]) <= 3
        gaps = []
        for line in row["principles"]:
            word, trait = line.split("-")
            levels = [level_of(text, trait) for text in row["completions"]]
            gaps.append((levels[0] - levels[1]) * (1 if word == "want" else -1))
        surest = max(map(abs, gaps))
        assert surest in gaps, "one of the surest prefers the chosen completion"
    stage = build("stage", {"name": "principle_pairs", "principles": PRINCIPLES})
    chat = stage.prompt([{"role": "user", "content": "q"}], ["want-brief"])
    assert chat[0]["role"] == "system" and "- want-brief" in chat[0]["content"] and chat[1]["content"] == "q"


@pytest.mark.slow
def test_a_reward_model_reads_its_principles(make):
    """One principle decides: negated in the prompt it turns the preference; without it there is chance."""
    words = [*LEVELS, *PRINCIPLES, *PRINCIPLES.values()]
    judge = Bilinear(words).learn(make(400, 0, n=1, negate=0.5), steps=250)
    held = make(200, 1, n=1, negate=0.5)
    assert judge.accuracy(held) > 0.8
    turned = 0
    for row in held:
        (line,) = row["principles"]
        word, trait = line.split("-")
        other = row["prompt"].replace(line, f"{'avoid' if word == 'want' else 'want'}-{trait}")
        turned += judge.accuracy([row]) == 1.0 and judge.accuracy([{**row, "prompt": other}]) == 0.0
    assert turned / len(held) > 0.8
    conflicts = []  # each pair with a principle and with its negation
    for row in held:
        blind = {**row, "prompt": "q"}
        conflicts += [blind, {**blind, "completions": row["completions"][::-1]}]
    assert judge.accuracy(conflicts) == 0.5
