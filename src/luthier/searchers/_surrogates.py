"""What is believed of a goal between the configurations that were measured: a Gaussian process.

One share of the steps: f = mu + g, with g of a Matern-5/2 kernel with a length scale for each setting. Several shares:
f_0 = mu_0 + g_0 and f_t = rho_t f_{t-1} + mu_t + g_t, all g independent: linear autoregressive co-kriging, computed jointly,
so that nobody need be measured after every share. Everything is fitted at its maximum a posteriori; values are
standardised first, so priors have no unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

NUGGET = 1e-10  # variance that is added where values have no noise, or matrices of near points would not factor
WIDE = 10.0  # spread of the prior of a mean
VARIANCE, DELTA, RHO, NOISE = (0.0, 1.0), (-1.5, 1.5), (1.0, 1.0), (-5.0, 1.5)  # normal priors: of logarithms, of rho itself


@dataclass(frozen=True)
class Process:
    """A prior over functions of [.., settings] at levels 0 .. T-1, without what was seen."""

    scales: np.ndarray  # [T, settings] length scales
    variance: np.ndarray  # [T] of each g
    rho: np.ndarray  # [T - 1]
    noise: float  # variance of what is measured, around f

    def kernel(self, A: np.ndarray, B: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
        """[a, settings], [b, settings] and their levels -> [a, b]"""
        w, v = weights(of_a, self.rho), weights(of_b, self.rho)
        out = np.zeros((len(A), len(B)))
        for u, (s2, length) in enumerate(zip(self.variance, self.scales)):
            out += w[:, u, None] * v[None, :, u] * s2 * matern(np.sqrt(5 * _squares(A / length, B / length)))
        return out


def matern(r: np.ndarray) -> np.ndarray:
    """Matern-5/2 of sqrt(5) times the distance."""
    return (1 + r + r * r / 3) * np.exp(-r)


def _squares(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """[a, b] squared distances."""
    return np.maximum((A**2).sum(1)[:, None] + (B**2).sum(1)[None] - 2 * A @ B.T, 0.0)


def weights(levels: np.ndarray, rho: np.ndarray, without: int = -1) -> np.ndarray:
    """[n, T] how much of each g stands in f of a level: rho_{u+1} ... rho_t. without: the derivative by this rho."""
    out = np.zeros((len(levels), len(rho) + 1))
    for t in np.unique(levels):
        for u in range(t + 1):
            if without < 0 or u <= without < t:
                out[levels == t, u] = math.prod(rho[v] for v in range(u, t) if v != without)
    return out


class Surrogate:
    """A process after what was seen of it. Takes and gives values in their own units."""

    def __init__(self, process: Process, X: np.ndarray, y: np.ndarray, level: Sequence[int] | np.ndarray | None = None):
        """process: of the standardised values."""
        self.process, self.X, self.top = process, X, len(process.rho)
        self.level = np.full(len(X), self.top) if level is None else np.asarray(level)
        self.shift, self.spread = _units(y)
        K = process.kernel(X, X, self.level, self.level)
        self.lower = factored(K + (process.noise + NUGGET) * np.eye(len(X)))
        H, z = weights(self.level, process.rho), (y - self.shift) / self.spread
        self.mean = _means(lambda b: cho_solve((self.lower, True), b), H, z)
        self.alpha = cho_solve((self.lower, True), z - H @ self.mean)

    @property
    def noise(self) -> float:
        """The variance of a measurement around the function."""
        return self.process.noise * self.spread**2

    def _levels(self, Z: np.ndarray, level: int | None) -> np.ndarray:
        return np.full(len(Z), self.top if level is None else level)

    def at(self, Z: np.ndarray, level: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """[c, settings] -> posterior mean [c] and variance [c] of f, at the highest level or another."""
        t = self._levels(Z, level)
        k = self.process.kernel(Z, self.X, t, self.level)
        w = weights(t[:1], self.process.rho)[0]
        prior = float(w**2 @ self.process.variance)
        v = solve_triangular(self.lower, k.T, lower=True)
        mean = w @ self.mean + k @ self.alpha
        return self.shift + self.spread * mean, self.spread**2 * np.maximum(prior - (v * v).sum(0), 0.0)

    def covariance(self, A: np.ndarray, B: np.ndarray, of_a: int | None = None, of_b: int | None = None) -> np.ndarray:
        """Posterior covariance [a, b] of f between points and levels."""
        s, t = self._levels(A, of_a), self._levels(B, of_b)
        va, vb = (solve_triangular(self.lower, self.process.kernel(self.X, Z, self.level, u), lower=True) for Z, u in ((A, s), (B, t)))
        return self.spread**2 * (self.process.kernel(A, B, s, t) - va.T @ vb)

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


def _units(y: np.ndarray) -> tuple[float, float]:
    return float(np.mean(y)), float(np.std(y)) or 1.0


def _means(solve, H: np.ndarray, z: np.ndarray) -> np.ndarray:
    """[T] what the constants are most likely, given the kernel."""
    KH = solve(H)
    return np.linalg.solve(H.T @ KH + np.eye(H.shape[1]) / WIDE**2, KH.T @ z)


# ---------------------------------------------------------------------------------------------- fitting


def fit(
    X: np.ndarray,
    y: np.ndarray,
    level: Sequence[int] | np.ndarray | None = None,
    levels: int = 1,
    noise: float | None = None,
    sparse: float = 0.0,
) -> Surrogate:
    """The most likely process of y [n] at X [n, settings]. noise: its known variance; None: to be found as well.

    sparse: a shrinkage. Then the inverse squares of length scales have half-Cauchy priors of this scale, as in SAAS: most
    settings count for nothing until values say otherwise. Else they are lognormal, longer where settings are many.
    """
    (n, d), T = X.shape, levels
    at = np.full(n, T - 1) if level is None else np.asarray(level)
    shift, spread = _units(y)
    z = (y - shift) / spread
    known = None if noise is None else noise / spread**2
    D = 5 * (X[:, None] - X[None]) ** 2
    D = np.ascontiguousarray(np.moveaxis(D, 2, 0))  # [d, n, n]
    prior = np.array([
        *[VARIANCE if u == 0 else DELTA for u in range(T)],
        *[(math.sqrt(2) + math.log(d) / 2, math.sqrt(3))] * (T * d), *[RHO] * (T - 1), *([NOISE] if known is None else []),
    ])  # fmt: skip
    low = np.array([-7.0] * T + [-5.0] * (T * d) + [-5.0] * (T - 1) + [-16.0] * (known is None))
    high = np.array([7.0] * T + [6.0] * (T * d) + [5.0] * (T - 1) + [1.0] * (known is None))

    def parts(theta: np.ndarray) -> Process:
        return Process(
            np.exp(theta[T : T + T * d]).reshape(T, d), np.exp(theta[:T]), theta[T + T * d : 2 * T - 1 + T * d],
            math.exp(theta[-1]) if known is None else known,
        )  # fmt: skip

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the logarithm of the posterior, and its gradient."""
        p = parts(theta)
        W, grad = weights(at, p.rho), np.zeros_like(theta)
        K, kept = (p.noise + NUGGET) * np.eye(n), []
        for u in range(T):
            r = np.sqrt(np.tensordot(p.scales[u] ** -2, D, 1))
            e = p.variance[u] * np.exp(-r)
            both = np.outer(W[:, u], W[:, u])
            k = (1 + r + r * r / 3) * e
            kept.append((k, both, (1 + r) * e / 3))
            K = K + both * k
        try:
            factor = cho_factor(K, lower=True, check_finite=False)
        except LinAlgError:
            return 1e10, grad
        inverse = cho_solve(factor, np.eye(n), check_finite=False)
        mean = _means(lambda b: inverse @ b, W, z)
        rest = z - W @ mean
        alpha = inverse @ rest
        value = 0.5 * rest @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * mean @ mean / WIDE**2
        G = 0.5 * (inverse - np.outer(alpha, alpha))  # d value / d K
        for u, (k, both, slope) in enumerate(kept):
            Gu = G * both
            grad[u] = (Gu * k).sum()
            grad[T + u * d : T + (u + 1) * d] = np.tensordot(D, Gu * slope, 2) / p.scales[u] ** 2
            for v in range(T - 1):
                dW = weights(at, p.rho, v)[:, u]
                grad[T + T * d + v] += 2 * dW @ (G * k) @ W[:, u] - alpha @ dW * mean[u]
        if known is None:
            grad[-1] = p.noise * np.trace(G)
        off = (theta - prior[:, 0]) / prior[:, 1]
        if sparse:
            s = slice(T, T + T * d)
            ratio = np.exp(-4 * theta[s]) / sparse**2  # of the inverse square of a length scale to its prior's scale, squared
            value += (2 * theta[s] + np.log1p(ratio)).sum()
            grad[s] += 2 - 4 * ratio / (1 + ratio)
            off[s] = 0
        return value + 0.5 * off @ off, grad + off / prior[:, 1]

    begins = []
    for length in (0.3, 1.5) if not sparse else (0.5, 5.0):  # a posterior has several peaks: rough and smooth
        begin = prior[:, 0].copy()
        begin[T : T + T * d] = math.log(length * math.sqrt(d))
        begins.append(np.clip(begin, low, high))
    found = [
        minimize(loss, b, jac=True, method="L-BFGS-B", bounds=list(zip(low, high)), options={"maxiter": 40, "ftol": 1e-5}) for b in begins
    ]
    return Surrogate(parts(min(found, key=lambda f: f.fun).x), X, y, at)
