"""quip: exact shares of quoted n-grams, a filter within its design, and DPO that makes a policy quote."""

from __future__ import annotations

import json
import random
import string
from types import SimpleNamespace

import pytest
import torch

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.rewards.rules.quip import Bloom, grams
from luthier.registry import build
from luthier.toy import bandit

WORDS = "the river stone of an old bridge that carries water under some low hills and fields".split()


@pytest.fixture
def corpus(tmp_path) -> tuple[str, str]:
    """A file, and its text."""
    rng = random.Random(0)
    text = " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(3000))
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    return str(path), text


def noise(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(string.ascii_letters + "äöü漢字") for _ in range(n))


def test_quotes_are_1_and_noise_is_0(corpus, tmp_path):
    path, text = corpus
    judge, rng = build("reward", {"name": "quip", "corpus": path}), random.Random(1)
    half = text[500:600] + noise(rng, 100)
    scores = judge.scores({}, [text[100:400], noise(rng, 5000), half, text[:24], text])
    assert scores[0] == scores[4] == 1.0 and scores[1] < 0.01 and scores[3] == 0.0
    exact = {text[i : i + 25] for i in range(len(text) - 24)}
    share = sum(half[i : i + 25] in exact for i in range(len(half) - 24)) / (len(half) - 24)
    assert share <= scores[2] < share + 0.02
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n".join(json.dumps({"text": part}) for part in (text[:300], text[300:])))
    apart = build("reward", {"name": "quip", "corpus": str(lines)}).scores({}, [text[:300], text[250:350]])
    assert apart[0] == 1.0 and apart[1] < 0.75  # no n-gram reaches over two documents
    with pytest.raises(RecipeError, match="cannot be read"):
        build("reward", {"name": "quip", "corpus": str(tmp_path / "none.txt")}).scores({}, ["x"])


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_the_filter_is_no_worse_than_its_design(corpus, rate):
    _, text = corpus
    keys = grams(text, 25)
    bloom = Bloom(len(keys), rate)
    bloom.add(keys)
    assert bloom.contains(keys).all()
    others = grams(noise(random.Random(2), 100_000), 25)
    error = (rate * (1 - rate) / len(others)) ** 0.5
    assert float(bloom.contains(others).mean()) < rate + 5 * error


def test_dpo_quotes_more_at_the_same_length(corpus):
    """Answers of six segments, each quoted or not: pairs by quip alone move what is quoted, not length."""
    path, text = corpus
    judge, rng = build("reward", {"name": "quip", "corpus": path}), random.Random(3)
    answers = []
    for size in range(12):
        for quotes in range(6):
            parts = []
            for segment in range(6):
                start = rng.randrange(len(text) - 100)
                length = 60 + 4 * size
                parts.append(text[start : start + length] if segment < quotes else noise(rng, length))
            answers.append("".join(parts))
    share = torch.tensor(judge.scores({}, answers))
    lengths = torch.tensor([float(len(a)) for a in answers])
    stage, rows = build("stage", {"name": "equal_length_pairs", "length": 0.1}), []
    sampler = torch.Generator().manual_seed(0)
    for place in range(200):
        arms = torch.randint(len(answers), (32,), generator=sampler).tolist()
        row = {"id": str(place), "prompt": "q", "completions": [answers[a] for a in arms]}
        rows.append({**row, "scores": share[arms].tolist()})
    pairs = []
    for row in stage(rows, SimpleNamespace(clock=Clock(), warn=lambda sentence: None)):
        pairs.append({**row, "prompt": [0], "completions": [[answers.index(c)] for c in row["completions"]]})
    assert len(pairs) > 100
    policy = bandit.Arms(torch.zeros(len(answers)), width=0.0)
    roles, adam = bandit.roles_of(policy), torch.optim.Adam(policy.parameters(), lr=0.1)
    objective = build("objective", {"name": "dpo", "beta": 0.1})
    for _ in range(60):
        adam.zero_grad()
        bandit.average(objective, roles, pairs).backward()
        adam.step()
    likely = policy.log_policy().detach().exp()
    assert float(likely @ share) > 1.5 * float(share.mean())
    assert float(likely @ lengths) == pytest.approx(float(lengths.mean()), rel=0.1)
