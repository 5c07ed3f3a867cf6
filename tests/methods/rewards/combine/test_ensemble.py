"""ensemble: its modes and their limits, the unbiased estimate of best-of-n, and rewards that are not
fooled.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from luthier.methods.rewards.combine._best_of_n import best_of_n, best_of_n_kl
from luthier.registry import build

ROW = {"id": "r", "prompt": "x", "answer": "a b"}
OF = [{"name": "length"}, {"name": "length", "of": "characters"}, "exact_match"]
TEXTS = ["a", "a b", "c d e", ""]


def scores(**settings) -> list[float]:
    return build("reward", {"name": "ensemble", "of": OF, **settings}).scores(ROW, TEXTS)


def test_modes_and_their_limits():
    mean, worst = scores(mode="mean"), scores(mode="worst")
    assert scores(mode="uncertain", coefficient=0.0) == mean
    assert all(w <= m for w, m in zip(worst, mean, strict=True))
    assert mean[1] == pytest.approx((2 + 3 + 1) / 3) and worst[1] == 1.0
    variance = ((2 - 2) ** 2 + (3 - 2) ** 2 + (1 - 2) ** 2) / 3
    assert scores(mode="uncertain", coefficient=0.1)[1] == pytest.approx(2 - 0.1 * variance)
    alone = [scores(mode=mode, of=["f1"]) for mode in ("mean", "worst", "uncertain")]
    assert alone[0] == alone[1] == alone[2]
    standard = scores(mode="mean", means=[1, 1, 0], deviations=[1, 2, 1])
    assert standard[1] == pytest.approx((1 + 1 + 1) / 3)


def test_the_estimate_of_best_of_n_is_that_over_all_subsets():
    rng = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 8, generator=rng).tolist()
    for n in range(1, 9):
        best = [gold[max(some, key=lambda i: proxy[i])] for some in itertools.combinations(range(8), n)]
        assert best_of_n(proxy, gold, n) == pytest.approx(sum(best) / len(best))
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(ValueError, match="9"):
        best_of_n(proxy, gold, 9)


def test_an_ensemble_is_not_over_optimised():
    """Five proxies of a true reward, each of which grossly overrates some few samples of its own. Best of
    512 by one of them turns down again; by the worst or the uncertain one it does not, and is better.
    """
    rng = torch.Generator().manual_seed(1)
    gold = torch.randn(6000, generator=rng)
    proxies = gold + 0.5 * torch.randn(5, 6000, generator=rng)
    fooled = torch.rand(5, 6000, generator=rng) < 0.01
    proxies = torch.where(fooled, 6 - gold, proxies)
    combine = {
        mode: build("reward", {"name": "ensemble", "of": OF, "mode": mode}) for mode in ("worst", "uncertain")
    }
    judged = {"single": proxies[0].tolist()}
    for mode, judge in combine.items():
        judged[mode] = [judge.combined(each) for each in proxies.T.tolist()]
    at = {name: [best_of_n(values, gold.tolist(), n) for n in (16, 512)] for name, values in judged.items()}
    assert at["single"][1] < at["single"][0], "optimised further, it gets worse"
    for mode in combine:
        assert at[mode][1] > at[mode][0] and at[mode][1] > at["single"][1] + 1
