"""What best-of-n of a reward gives: an unbiased estimate from N samples, and its distance from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """The gold reward of the sample that the proxy ranks first among n, averaged over all n-subsets of the N
    samples. Equal proxy rewards are ranked by their place. Raises ValueError where n is not in 1..N.
    """
    total = len(proxy)
    if not 1 <= n <= total:
        raise ValueError(f"n is {n}, but there are {total} samples")
    order = sorted(range(total), key=lambda i: proxy[i])
    value, subsets = 0.0, math.comb(total, n)
    for rank in range(n - 1, total):  # the best of a subset whose others are all below it
        value += math.comb(rank, n - 1) / subsets * gold[order[rank]]
    return value


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the policy, in nats: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n
