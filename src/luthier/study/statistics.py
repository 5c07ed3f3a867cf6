"""Statistics of studies: what may be said of arms that were measured on the same rows with the same seeds.

What to call:

- `paired_difference(a, b)`: the mean of a - b with its interval and p value, over seeds and rows at once;
- `holm(p_values)`: p values of a family of comparisons, corrected for their number;
- `t_interval(values)`: Student's t interval of the mean of a few numbers, such as one for each seed;
- `seeds_for(deviation, half_width)`: how many seeds such an interval needs to be narrow enough;
- `bootstrap_interval(values)`: percentile bootstrap of a mean over seeds and rows; numbers of seeds alone
  are `values[:, None]`;
- `pareto_front(points)` and `hypervolume(points, worst)`: several goals at once.

A measurement is a matrix [S, R]: S seeds, R rows. Another seed would have given other numbers, and so would
other rows, so both are drawn at random in every interval here. Nothing is called a difference that its own
interval does not support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # as scipy.stats, which takes 0.7 s to import

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of a - b over seeds and rows."""

    mean: float
    low: float  # of the interval
    high: float
    p: float  # of a mean at least as far from 0, were there no difference
    seeds: int
    rows: int

    @property
    def excludes_zero(self) -> bool:
        """Does the interval itself exclude 0?"""
        return self.low > 0 or self.high < 0


def paired_difference(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> Difference:
    """a, b: [S, R], the same seeds and rows in the same order. level: of the interval.

    Rows and seeds are crossed random effects: the variance of the mean is (rows' + seeds' - remainder's mean
    square) / SR, with Satterthwaite's degrees of freedom (the quasi-F of two-way analysis of variance). With
    one seed only rows are drawn, with one row only seeds: then nothing is said of what was not repeated.
    Raises ValueError where a - b is no matrix or is empty.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    if d.ndim != 2 or not d.size:
        raise ValueError(f"expected a matrix [seeds, rows], not {d.shape}")
    mean = float(d.mean())
    variance, freedom = _variance_of_mean(d)
    if variance <= 0:  # alike everywhere, or apart by the same everywhere: no spread to judge by
        equal = mean == 0 or d.size < 2
        return Difference(mean, mean, mean, 1.0 if equal else 0.0, *d.shape)
    error = variance**0.5
    half = _t_quantile(level, freedom) * error
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    return Difference(mean, mean - half, mean + half, p, *d.shape)


def _t_quantile(level: float, freedom: float) -> float:
    """Half the width of Student's interval at a level, in standard errors."""
    return float(stdtrit(freedom, (1 + level) / 2))


def _variance_of_mean(d: np.ndarray) -> tuple[float, float]:
    """The variance of the mean of d [S, R], and its degrees of freedom."""
    S, R = d.shape
    if d.size == 1:
        return float("nan"), 1
    if S == 1 or R == 1:
        return float(d.var(ddof=1)) / d.size, d.size - 1
    by_seed, by_row = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    seeds = R * float(((by_seed - d.mean()) ** 2).sum()) / (S - 1)
    rows = S * float(((by_row - d.mean()) ** 2).sum()) / (R - 1)
    rest = float(((d - by_seed - by_row + d.mean()) ** 2).sum()) / ((S - 1) * (R - 1))
    total = seeds + rows - rest
    # the remainder is estimated too: never below what either alone would say
    if total <= max(seeds, rows):
        return (seeds / (S * R), S - 1) if seeds >= rows else (rows / (S * R), R - 1)
    spread = seeds**2 / (S - 1) + rows**2 / (R - 1) + rest**2 / ((S - 1) * (R - 1))
    return total / (S * R), max(1.0, total**2 / spread)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's t interval of the mean of two numbers or more; of numbers that are all equal, the number
    itself.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        raise ValueError(f"an interval needs two or more numbers, not {len(x)}")
    mean = float(x.mean())
    half = _t_quantile(level, len(x) - 1) * float(x.std(ddof=1)) / len(x) ** 0.5
    return mean - half, mean + half


def seeds_for(deviation: float, half_width: float, level: float = LEVEL, most: int = 10_000) -> int:
    """How many seeds make Student's t interval of a mean at most +- half_width wide, where single seeds
    spread by `deviation` about it; `most` where so many do not.
    """
    for n in range(2, most):
        if _t_quantile(level, n - 1) * deviation / n**0.5 <= half_width:
            return n
    return most


def bootstrap_interval(values: np.ndarray, times: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of [S, R], seeds and rows resampled together (the pigeonhole bootstrap
    of Owen, 2007, which SciPy does not have; with one seed or one row it is the ordinary one).
    """
    x = np.asarray(values, float)
    draw = np.random.default_rng(seed)
    S, R = x.shape
    seed_weights = draw.multinomial(S, np.full(S, 1 / S), size=times) / S  # [times, S]
    row_weights = draw.multinomial(R, np.full(R, 1 / R), size=times) / R  # [times, R]
    means = np.einsum("ts,sr,tr->t", seed_weights, x, row_weights)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of comparisons after Holm, so that in all of it a difference is claimed wrongly no
    more often than in one. nan (nothing was repeated) counts as 1.
    """
    p = np.nan_to_num(np.asarray(p_values, float), nan=1.0)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def pareto_front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """The names of the points that no other dominates: every goal is better the smaller. Equal points stay
    together; a point with a nan compares with none, and stays.
    """
    import moocore

    complete = [name for name, point in points.items() if not np.isnan(point).any()]
    dominated: set[str] = set()
    if complete:
        matrix = np.array([points[name] for name in complete], float)
        best = moocore.is_nondominated(matrix, keep_weakly=True)
        dominated = {name for name, flag in zip(complete, best) if not flag}
    return [name for name in points if name not in dominated]


def hypervolume(points: Sequence[Sequence[float]], worst: Sequence[float]) -> float:
    """The volume that points (each goal the smaller the better) dominate below `worst`; 0 where none lies
    below it in every goal.
    """
    import moocore

    matrix = np.asarray(points, float).reshape(-1, len(worst))
    return float(moocore.hypervolume(matrix, ref=np.asarray(worst, float)))
