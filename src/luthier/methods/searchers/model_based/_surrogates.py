"""A Gaussian process as the model of a goal between the measured configurations.

f = mu + g, with g of a Matern-5/2 kernel with a length scale for each setting. All hyperparameters are
maximum a posteriori; values are standardised first, so priors have no unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

# variance that is added where values have no noise, or matrices of near points would not factor
NUGGET = 1e-10
WIDE = 10.0  # spread of the prior of a mean
VARIANCE, NOISE = (0.0, 1.0), (-5.0, 1.5)  # normal priors of logarithms


@dataclass(frozen=True)
class Process:
    """A prior over functions of [.., settings], without observations."""

    scales: np.ndarray  # [settings] length scales
    variance: float  # of g
    noise: float  # variance of what is measured, around f

    def kernel(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        """[a, settings], [b, settings] -> [a, b]"""
        return self.variance * matern(np.sqrt(5 * squares(A / self.scales, B / self.scales)))


def matern(r: np.ndarray) -> np.ndarray:
    """Matern-5/2 of sqrt(5) times the distance."""
    return (1 + r + r * r / 3) * np.exp(-r)


def squares(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """[a, b] squared distances."""
    return np.maximum((A**2).sum(1)[:, None] + (B**2).sum(1)[None] - 2 * A @ B.T, 0.0)


class Surrogate:
    """A process conditioned on observations. Takes and returns values in their own units."""

    def __init__(self, process: Process, X: np.ndarray, y: np.ndarray):
        """process: of the standardised values."""
        self.process, self.X = process, X
        self.shift, self.spread = _units(y)
        self.lower = factored(process.kernel(X, X) + (process.noise + NUGGET) * np.eye(len(X)))
        z = (y - self.shift) / self.spread
        self.mean = _mean(cho_solve((self.lower, True), np.ones(len(X))), z)
        self.alpha = cho_solve((self.lower, True), z - self.mean)

    @property
    def noise(self) -> float:
        """The variance of a measurement around the function."""
        return self.process.noise * self.spread**2

    def at(self, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[c, settings] -> posterior mean [c] and variance [c] of f."""
        k = self.process.kernel(Z, self.X)
        v = solve_triangular(self.lower, k.T, lower=True)
        mean = self.mean + k @ self.alpha
        return self.shift + self.spread * mean, self.spread**2 * np.maximum(
            self.process.variance - (v * v).sum(0), 0.0
        )

    def covariance(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        """Posterior covariance [a, b] of f between points."""
        va, vb = (solve_triangular(self.lower, self.process.kernel(self.X, Z), lower=True) for Z in (A, B))
        return self.spread**2 * (self.process.kernel(A, B) - va.T @ vb)

    def draws(self, Z: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """[s, c] functions at Z, from the posterior. normal [s, c]: standard normal numbers."""
        lower = factored(self.covariance(Z, Z))
        return self.at(Z)[0] + normal @ lower.T


def factored(K: np.ndarray) -> np.ndarray:
    """Lower Cholesky factor, with as little on the diagonal as it takes."""
    size = float(np.mean(np.diag(K))) or 1.0
    for more in (0.0, *(10.0**e for e in range(-10, 1))):
        try:
            return cholesky(K + more * size * np.eye(len(K)), lower=True)
        except LinAlgError:
            continue
    raise LinAlgError("a covariance that is not positive definite")


def smooth(d: int) -> tuple[float, float]:
    """The normal prior of a length scale's logarithm among d settings."""
    return math.sqrt(2) + math.log(d) / 2, math.sqrt(3)


def _units(y: np.ndarray) -> tuple[float, float]:
    return float(np.mean(y)), float(np.std(y)) or 1.0


def _mean(solved: np.ndarray, z: np.ndarray) -> float:
    """What the constant is most likely, given the kernel. solved: its inverse times ones."""
    return float(solved @ z / (solved.sum() + 1 / WIDE**2))


# ---------------------------------------------------------------------- fitting


def fit(X: np.ndarray, y: np.ndarray, noise: float | None = None, sparse: float = 0.0) -> Surrogate:
    """The most likely process of y [n] at X [n, settings]. noise: its known variance; None: to be found as
    well.

    sparse: a shrinkage. Then the inverse squares of length scales have half-Cauchy priors of this scale, as
    in SAAS: most settings count for nothing until values say otherwise. Else they are lognormal, longer where
    settings are many.
    """
    n, d = X.shape
    shift, spread = _units(y)
    z = (y - shift) / spread
    fixed_noise = None if noise is None else noise / spread**2
    D = 5 * (X[:, None] - X[None]) ** 2
    D = np.ascontiguousarray(np.moveaxis(D, 2, 0))  # [d, n, n]
    fits_noise = fixed_noise is None
    prior = np.array([VARIANCE, *[smooth(d)] * d, *[NOISE] * fits_noise])
    low = np.array([-7.0] + [-5.0] * d + [-16.0] * fits_noise)
    high = np.array([7.0] + [6.0] * d + [1.0] * fits_noise)
    s = slice(1, 1 + d)  # of theta: the logarithms of the length scales

    def parts(theta: np.ndarray) -> Process:
        own_noise = math.exp(theta[-1]) if fixed_noise is None else fixed_noise
        return Process(np.exp(theta[s]), math.exp(theta[0]), own_noise)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the logarithm of the posterior, and its gradient."""
        p, grad = parts(theta), np.zeros_like(theta)
        r = np.sqrt(np.tensordot(p.scales**-2, D, 1))
        e = p.variance * np.exp(-r)
        k = (1 + r + r * r / 3) * e
        try:
            factor = cho_factor((p.noise + NUGGET) * np.eye(n) + k, lower=True, check_finite=False)
        except LinAlgError:
            return 1e10, grad
        inverse = cho_solve(factor, np.eye(n), check_finite=False)
        mean = _mean(inverse.sum(1), z)
        rest = z - mean
        alpha = inverse @ rest
        value = 0.5 * rest @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * mean**2 / WIDE**2
        G = 0.5 * (inverse - np.outer(alpha, alpha))  # d value / d K
        grad[0] = (G * k).sum()
        grad[s] = np.tensordot(D, G * (1 + r) * e / 3, 2) / p.scales**2
        if fixed_noise is None:
            grad[-1] = p.noise * np.trace(G)
        off = (theta - prior[:, 0]) / prior[:, 1]
        if sparse:
            # of the inverse square of a length scale to its prior's scale, squared
            ratio = np.exp(-4 * theta[s]) / sparse**2
            value += (2 * theta[s] + np.log1p(ratio)).sum()
            grad[s] += 2 - 4 * ratio / (1 + ratio)
            off[s] = 0
        return value + 0.5 * off @ off, grad + off / prior[:, 1]

    begins = []
    for length in (0.3, 1.5) if not sparse else (0.5, 5.0):  # a posterior has several peaks: rough and smooth
        begin = prior[:, 0].copy()
        begin[s] = math.log(length * math.sqrt(d))
        begins.append(np.clip(begin, low, high))
    return Surrogate(parts(lowest(loss, begins, low, high)), X, y)


def lowest(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]],
    begins: Sequence[np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
):
    """Where a function that comes with its gradient is least, of the descents from each of these points."""
    bounds = list(zip(low, high))
    descents = [
        minimize(loss, b, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40, "ftol": 1e-5})
        for b in begins
    ]
    return min(descents, key=lambda f: f.fun).x
