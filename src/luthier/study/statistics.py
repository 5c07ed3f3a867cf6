"""Differences between arms that were measured on the same rows with the same seeds, and what may be said of
them.

A measurement is a matrix [S, R]: S seeds, R rows. Another seed would have given other numbers, and so would
other rows, so both are drawn at random in every interval here. Nothing is called a difference that its own
interval does not support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of a - b over seeds and rows."""

    mean: float
    low: float  # of the interval at LEVEL
    high: float
    p: float  # of a mean at least as far from 0, were there no difference
    seeds: int
    rows: int

    @property
    def seen(self) -> bool:
        """Does the interval itself exclude 0?"""
        return self.low > 0 or self.high < 0


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """a, b: [S, R], the same seeds and rows in the same order.

    Rows and seeds are crossed random effects: the variance of the mean is (rows' + seeds' - remainder's mean
    square) / SR, with Satterthwaite's degrees of freedom (the quasi-F of two-way analysis of variance). With
    one seed only rows are drawn, with one row only seeds: then nothing is said of what was not repeated.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    if d.ndim != 2 or not d.size:
        raise ValueError(f"[seeds, rows] is wanted, not {d.shape}")
    mean, (variance, freedom) = float(d.mean()), _variance(d)
    if variance <= 0:  # alike everywhere, or apart by the same everywhere: no spread to judge by
        sure = mean == 0 or d.size < 2
        return Difference(mean, mean, mean, 1.0 if sure else 0.0, *d.shape)
    from scipy.stats import t

    error = variance**0.5
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, freedom)), *d.shape)


def _variance(d: np.ndarray) -> tuple[float, float]:
    """Of the mean of d [S, R], and its degrees of freedom."""
    S, R = d.shape
    if S == 1 or R == 1:
        n = d.size
        return (float(d.var(ddof=1)) / n, n - 1) if n > 1 else (float("nan"), 1)
    by_seed, by_row = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    seeds = R * float(((by_seed - d.mean()) ** 2).sum()) / (S - 1)
    rows = S * float(((by_row - d.mean()) ** 2).sum()) / (R - 1)
    rest = float(((d - by_seed - by_row + d.mean()) ** 2).sum()) / ((S - 1) * (R - 1))
    together = seeds + rows - rest
    # the remainder is estimated too: never below what either alone would say
    if together <= max(seeds, rows):
        return (seeds / (S * R), S - 1) if seeds >= rows else (rows / (S * R), R - 1)
    spread = seeds**2 / (S - 1) + rows**2 / (R - 1) + rest**2 / ((S - 1) * (R - 1))
    return together / (S * R), max(1.0, together**2 / spread)


def interval(values: np.ndarray, times: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of [S, R], seeds and rows drawn anew together (the pigeonhole
    bootstrap).
    """
    x = np.asarray(values, float)
    draw = np.random.default_rng(seed)
    S, R = x.shape
    weights_s = draw.multinomial(S, np.full(S, 1 / S), size=times) / S  # [times, S]
    weights_r = draw.multinomial(R, np.full(R, 1 / R), size=times) / R
    means = np.einsum("ts,sr,tr->t", weights_s, x, weights_r)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """p values of a family of comparisons, so that in all of it a difference is claimed wrongly no more often
    than in one.
    """
    order, out, most = np.argsort(ps), [1.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(ps) - rank) * float(ps[i])))
        out[int(i)] = most
    return out


def front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """The names that nobody beats everywhere: every goal is better the smaller; equal points stay together."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))

    return [n for n, p in points.items() if not any(beats(q, p) for m, q in points.items() if m != n)]


def expected_utility(points: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> float:
    """What users get on average (larger is better): each takes the point that is best under weights of their
    own.
    """
    return float((np.asarray(weights, float) @ np.asarray(points, float).T).max(1).mean())


def sparsity(points: Sequence[Sequence[float]]) -> float:
    """Squared gaps between neighbours on the front, goal by goal, by one less than its points. Of one point
    it says nothing: inf.
    """
    kept = np.unique([points[int(i)] for i in front({str(i): p for i, p in enumerate(points)})], axis=0)
    return (
        float((np.diff(np.sort(kept, axis=0), axis=0) ** 2).sum() / (len(kept) - 1))
        if len(kept) > 1
        else float("inf")
    )


def hypervolume(points: Sequence[Sequence[float]], worst: Sequence[float]) -> float:
    """The volume that points (smaller is better) dominate below `worst`. Exact, by slicing along the last
    goal.
    """
    inside = [tuple(map(float, p)) for p in points if all(x < w for x, w in zip(p, worst))]
    if not inside:
        return 0.0
    if len(worst) == 1:
        return float(worst[0]) - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    total = 0.0
    for i, p in enumerate(inside):
        upper = inside[i + 1][-1] if i + 1 < len(inside) else float(worst[-1])
        if upper > p[-1]:
            total += (upper - p[-1]) * hypervolume([q[:-1] for q in inside[: i + 1]], worst[:-1])
    return total
