"""overoptimization: links of known correlation, a policy that learns to be long, and one that learns what is
wanted.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from luthier.clock import Clock
from luthier.methods.evaluators._trajectory import spearman
from luthier.methods.evaluators.quality.overoptimization import Overoptimization, overoptimized_from
from luthier.registry import build

BEST = 4  # words of the best answer
LENGTHS = torch.arange(1, 11)  # words


@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.5, 0.9])
def test_links_of_known_correlation(rho):
    rng = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 40_000, generator=rng, dtype=torch.float64)
    expected = 6 / math.pi * math.asin(rho / 2)  # of ranks, where values are normal
    assert spearman(x, rho * x + math.sqrt(1 - rho**2) * e) == pytest.approx(expected, abs=0.02)


def test_it_is_scipys():
    from scipy.stats import spearmanr

    x, y = torch.randint(0, 5, (2, 60), generator=torch.Generator().manual_seed(0)).double()
    assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)
    assert spearman(torch.zeros(5), y[:5]) is None


class Gold:
    """A reward that likes answers of BEST words."""

    kind = "reward"
    requires: frozenset = frozenset()

    def scores(self, row, texts):
        return [1 - abs(len(text.split()) - BEST) / 10 for text in texts]


def a_run(tmp_path, proxy) -> list[dict[str, float]]:
    """Metrics along the tuning of a policy over lengths by the exact gradient of the expected proxy."""
    rewards = torch.tensor(proxy.scores({}, ["w " * int(n) for n in LENGTHS])).double()
    logits = torch.zeros(len(LENGTHS), dtype=torch.float64)
    logits[:2] = 4.0  # short at first

    def generate(prompts, n, seeds, **how):
        answers = []
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed % 2**31)
            drawn = torch.multinomial(logits.softmax(0), n, replacement=True, generator=rng)
            answers.append([list(range(int(LENGTHS[k]))) for k in drawn])
        return answers

    renderer = SimpleNamespace(stop_ids=[1], prompt=lambda row: [0], answer=lambda ids: "w " * len(ids))
    roles = SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer, clock=Clock())
    rows = [{"id": str(i), "prompt": "?"} for i in range(32)]
    evaluator = Overoptimization(proxy=proxy, gold=Gold(), tolerance=0.05)
    results = []
    for step in range(0, 201, 20):
        roles.clock.step = step
        when = "before" if step == 0 else "after" if step == 200 else "during"
        results.append(evaluator.run(roles, rows, tmp_path, when))
        for _ in range(20):
            p = logits.softmax(0)
            logits += 0.1 * p * (rewards - p @ rewards) * 4
    return results


def test_a_reward_that_likes_length(tmp_path):
    """The step of the best gold score is named, and none before it fell."""
    results = a_run(tmp_path, build("reward", {"name": "length", "scale": 0.3}))
    gold = [r["gold_reward"] for r in results]
    top = max(range(len(gold)), key=gold.__getitem__)
    assert 0 < top < len(gold) - 1 and gold[-1] < gold[top] - 0.1
    assert results[-1]["overoptimized_from"] == 20 * top
    assert "overoptimized_from" not in results[top]
    assert results[-1]["proxy_reward"] > results[top]["proxy_reward"]
    assert results[0]["proxy_length"] == pytest.approx(1.0)
    points = [json.loads(line) for line in (tmp_path / "overoptimization.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == list(range(0, 201, 20))


def test_nothing_where_nothing_is_planted(tmp_path):
    """A proxy that is the gold score misleads nobody; neither does noise within the tolerance."""
    results = a_run(tmp_path, Gold())
    assert not any("overoptimized_from" in r for r in results)
    assert results[-1]["proxy_gold_answers"] == pytest.approx(1.0)
    assert results[-1]["proxy_gold_steps"] == pytest.approx(1.0)
    noise = 0.01 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    proxy = [float(k) for k in range(20)]
    flagged = [overoptimized_from(range(20), proxy, line.tolist(), 0.1) for line in noise]
    assert flagged == [None] * 50
    fall = [0.1 * min(k, 14 - k) for k in range(20)]  # best at 7
    flagged = [overoptimized_from(range(20), proxy, (torch.tensor(fall) + e).tolist(), 0.1) for e in noise]
    assert flagged == [7] * 50
