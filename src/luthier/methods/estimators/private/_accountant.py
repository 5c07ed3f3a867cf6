"""What a private run spends: the Rényi differential privacy of Gaussian noise on Poisson samples.

A step that reads each row with probability q, clips what it contributes to norm C and adds noise of standard
deviation sigma C has a Rényi divergence of order alpha of at most log(A(alpha)) / (alpha - 1), in closed form
(Mironov, Talwar and Zhang, arXiv:1908.10530), for neighbours that differ by one row that is there or not.
Steps add up; the sum becomes (epsilon, delta) by the conversion of Balle et al. (arXiv:1905.09982, theorem
21). Every order gives a valid bound; the best one is searched for instead of taken from a list.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, log_ndtr, logsumexp

from luthier.errors import RecipeError

ORDERS = (1.01, 2048.0)  # between which the best order is searched for
WHOLE = 16.0  # orders above are rounded up to whole numbers, whose sum is finite
NOISE = (1e-2, 1e4)  # between which a noise multiplier is searched for
PRECISE = 1e-4  # relative error of a noise multiplier that is calibrated
SMALL = -32.0  # log of terms that are left out of an infinite sum
LONGEST = 2**12  # terms of a sum; of orders that need more, a bound is taken


def renyi_divergence(rate: float, noise: float, order: float) -> float:
    """Of one step: rate is the probability of each row, noise the multiplier sigma, order above 1."""
    if rate == 0:
        return 0.0
    if rate == 1:
        return order / (2 * noise**2)
    if float(order).is_integer():
        moment = _whole_moment(rate, noise, int(order))
    else:
        moment = _moment(rate, noise, order)
    return max(0.0, moment / (order - 1))


def _whole_moment(rate: float, noise: float, order: int) -> float:
    """log A of a whole order: a binomial sum."""
    i = np.arange(order + 1)
    terms = _log_binomial(order, i) + i * math.log(rate) + (order - i) * math.log1p(-rate)
    return float(np.asarray(logsumexp(terms + (i * i - i) / (2 * noise**2))))


def _moment(rate: float, noise: float, order: float) -> float:
    """log A of any order: two infinite sums, on both sides of the point where the densities are equal."""
    middle = noise**2 * math.log(1 / rate - 1) + 0.5
    count, spread = 64, math.sqrt(2) * noise
    while True:
        i = np.arange(count)
        j = order - i
        binomial, sign = _log_binomial(order, i), _sign_of_binomial(order, i)
        below = binomial + i * math.log(rate) + j * math.log1p(-rate)
        below += (i * i - i) / (2 * noise**2) + _log_half_erfc((i - middle) / spread)
        above = binomial + j * math.log(rate) + i * math.log1p(-rate)
        above += (j * j - j) / (2 * noise**2) + _log_half_erfc((middle - j) / spread)
        if max(below[-1], above[-1]) < SMALL:
            break
        if count >= LONGEST:
            return _chord(rate, noise, order)
        count *= 4
    total = logsumexp(np.concatenate([below, above]), b=np.concatenate([sign, sign]))
    return float(np.asarray(total))


def _chord(rate: float, noise: float, order: float) -> float:
    """At least log A of an order whose sums converge too slowly: log A is convex in the order, and 0 at 1."""
    low = math.floor(order)
    below = _whole_moment(rate, noise, low) if low > 1 else 0.0
    above = _whole_moment(rate, noise, low + 1)
    return below + (order - low) * (above - below)


def _log_binomial(order: float, i: np.ndarray) -> np.ndarray:
    """log |order choose i|, for any order."""
    return gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)


def _sign_of_binomial(order: float, i: np.ndarray) -> np.ndarray:
    """Alternating beyond the order."""
    beyond = np.maximum(0, i - math.floor(order) - 1)
    return np.where(beyond % 2 == 0, 1.0, -1.0)


def _log_half_erfc(x: np.ndarray) -> np.ndarray:
    return log_ndtr(-x * math.sqrt(2))


def epsilon_of_order(divergence: float, order: float, delta: float) -> float:
    """The epsilon that a Rényi divergence of this order is worth at delta."""
    return divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=4096)
def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """What `steps` steps spend at delta; 0 without a step, infinite without noise."""
    return composed_epsilon(((noise, steps),), rate, delta)


@lru_cache(maxsize=4096)
def composed_epsilon(steps: tuple[tuple[float, int], ...], rate: float, delta: float) -> float:
    """What steps of different noise spend together: (noise multiplier, how many steps) each."""
    steps = tuple((noise, count) for noise, count in steps if count)
    if not steps or rate == 0:
        return 0.0
    if min(noise for noise, _ in steps) <= 0:
        return math.inf

    def spent(log_excess: float) -> float:
        order = 1 + math.exp(log_excess)
        if order > WHOLE:
            order = math.ceil(order)
        divergence = 0.0
        for noise, count in steps:
            divergence += count * renyi_divergence(rate, noise, order)
        return epsilon_of_order(divergence, order, delta)

    low, high = (math.log(order - 1) for order in ORDERS)
    best = minimize_scalar(spent, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    return max(0.0, float(best.fun))


@lru_cache(maxsize=64)
def noise_for(
    target: float, rate: float, steps: int, delta: float, spent: tuple[tuple[float, int], ...] = ()
) -> float:
    """The smallest noise multiplier with which `steps` steps spend at most `target`, rounded up.

    spent: (noise multiplier, how many steps) of the steps before them, which count. Raises RecipeError where
    no noise is enough.
    """

    def total(noise: float) -> float:
        return composed_epsilon((*spent, (noise, steps)), rate, delta)

    low, high = NOISE
    if total(high) > target:
        raise RecipeError(
            f"epsilon {target:g} at delta {delta:g} cannot be had in {steps:,} steps of this sampling rate"
            f" ({rate:.3g}); ask for more, or train for fewer steps"
        )
    while high / low > 1 + PRECISE:
        middle = math.sqrt(low * high)
        if total(middle) > target:
            low = middle
        else:
            high = middle
    return high
