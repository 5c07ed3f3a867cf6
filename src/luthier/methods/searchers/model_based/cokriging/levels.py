"""How partial runs predict full ones: one Gaussian process over settings and levels, which are fractions of
the steps.

f_0 = mu_0 + g_0 and f_t = rho_t-1 f_t-1 + mu_t + g_t, all g independent and with Matern-5/2 kernels: linear
autoregressive co-kriging, computed jointly, so that no configuration need be measured at every level. A
point's last number is its level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular

from luthier.methods.searchers.model_based._surrogates import (
    NOISE,
    NUGGET,
    VARIANCE,
    WIDE,
    Surrogate,
    factored,
    lowest,
    matern,
    smooth,
    squares,
)

RHO = (1.0, 0.7)  # normal prior
# of logarithms: what a level adds is neither small nor smooth until many tell so
DELTA, ROUGH = (-1.0, 1.0), (-1.0, 0.7)


@dataclass(frozen=True)
class Ladder:
    """A prior over functions of [.., settings, level], without observations."""

    scales: np.ndarray  # [T, settings] length scales
    variance: np.ndarray  # [T] of each g
    rho: np.ndarray  # [T - 1]
    noise: float  # variance of what is measured, around f

    def weights(self, A: np.ndarray) -> np.ndarray:
        """[a, T] how much of each g stands in f."""
        return recursion(self.rho)[_level(A)]

    def kernel(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        """[a, settings + 1], [b, settings + 1] -> [a, b]"""
        out = np.zeros((len(A), len(B)))
        for v, w, s2, length in zip(self.weights(A).T, self.weights(B).T, self.variance, self.scales):
            out += np.outer(v, w) * s2 * matern(np.sqrt(5 * squares(A[:, :-1] / length, B[:, :-1] / length)))
        return out


def recursion(rho: np.ndarray) -> np.ndarray:
    """[T, T] how much of g_u stands in f_t: rho_u ... rho_t-1."""
    T = len(rho) + 1
    return np.array([[math.prod(rho[u:t]) if u <= t else 0.0 for u in range(T)] for t in range(T)])


def on(level: int, X: np.ndarray) -> np.ndarray:
    """[n, settings] -> [n, settings + 1]"""
    return np.column_stack([X, np.full(len(X), level)])


def _level(X: np.ndarray) -> np.ndarray:
    return X[:, -1].astype(int)


class Joint(Surrogate):
    """A ladder conditioned on observations."""

    def __init__(self, process: Ladder, X: np.ndarray, y: np.ndarray):
        self.process, self.X, self.top = process, X, len(process.rho)
        self.shifts, self.spread = _units(y, _level(X), self.top + 1)
        self.lower = factored(process.kernel(X, X) + (process.noise + NUGGET) * np.eye(len(X)))
        H, z = process.weights(X), (y - self.shifts[_level(X)]) / self.spread
        self.means = _means(cho_solve((self.lower, True), H), H, z)
        self.alpha = cho_solve((self.lower, True), z - H @ self.means)

    def at(self, Z):
        w, k = self.process.weights(Z), self.process.kernel(Z, self.X)
        v = solve_triangular(self.lower, k.T, lower=True)
        mean, variance = w @ self.means + k @ self.alpha, w**2 @ self.process.variance - (v * v).sum(0)
        return self.shifts[_level(Z)] + self.spread * mean, self.spread**2 * np.maximum(variance, 0.0)

    def along(self, Z: np.ndarray, level: int) -> np.ndarray:
        """[c, settings] -> [c] posterior covariance of f on a level with f on the highest, at the same
        settings.
        """
        A, B = on(level, Z), on(self.top, Z)
        v, w = (solve_triangular(self.lower, self.process.kernel(self.X, P), lower=True) for P in (A, B))
        prior = self.process.weights(A) * self.process.weights(B) @ self.process.variance
        return self.spread**2 * (prior - (v * w).sum(0))


def _units(y: np.ndarray, level: np.ndarray, T: int) -> tuple[np.ndarray, float]:
    """[T] the mean of each level's values (of the nearest one's, where it has none), and their spread around
    it.
    """
    there = np.unique(level)
    shifts = np.array([np.mean(y[level == there[np.abs(there - t).argmin()]]) for t in range(T)])
    return shifts, float(np.sqrt(np.mean((y - shifts[level]) ** 2))) or 1.0


def _means(solved: np.ndarray, H: np.ndarray, z: np.ndarray) -> np.ndarray:
    """[T] what the constants are most likely, given the kernel. solved: its inverse times H."""
    return np.linalg.solve(H.T @ solved + np.eye(H.shape[1]) / WIDE**2, solved.T @ z)


def joint(X: np.ndarray, y: np.ndarray, T: int, noise: float | None = None) -> Joint:
    """The most likely ladder of T levels, of y [n] at X [n, settings + 1]. noise: its known variance; None:
    to be found as well.
    """
    at, (n, d) = _level(X), X[:, :-1].shape
    shifts, spread = _units(y, at, T)
    z, fixed_noise = (y - shifts[at]) / spread, None if noise is None else noise / spread**2
    D = np.ascontiguousarray(np.moveaxis(5 * (X[:, None, :-1] - X[None, :, :-1]) ** 2, 2, 0))  # [d, n, n]
    free = fixed_noise is None
    rough = (ROUGH[0] + math.log(d) / 2, ROUGH[1])
    prior = np.array(
        [
            VARIANCE,
            *[DELTA] * (T - 1),
            *[smooth(d)] * d,
            *[rough] * (T * d - d),
            *[RHO] * (T - 1),
            *[NOISE] * free,
        ]
    )
    low = np.array([-7.0] * T + [-5.0] * (T * d) + [-5.0] * (T - 1) + [-16.0] * free)
    high = np.array([7.0] * T + [6.0] * (T * d) + [5.0] * (T - 1) + [1.0] * free)
    # of theta: logarithms of variances [:T] and of length scales [T:a], rho [a:b]
    a, b = T + T * d, 2 * T - 1 + T * d

    def parts(theta: np.ndarray) -> Ladder:
        return Ladder(
            np.exp(theta[T:a]).reshape(T, d),
            np.exp(theta[:T]),
            theta[a:b],
            math.exp(theta[-1]) if fixed_noise is None else fixed_noise,
        )

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the logarithm of the posterior, and its gradient."""
        p, grad = parts(theta), np.zeros_like(theta)
        L = recursion(p.rho)
        W, r = L[at], np.sqrt(np.tensordot(p.scales**-2.0, D, 1))  # [n, T], [T, n, n]
        e = p.variance[:, None, None] * np.exp(-r)
        k, both = (1 + r + r * r / 3) * e, W.T[:, :, None] * W.T[:, None]
        try:
            factor = cho_factor(
                (p.noise + NUGGET) * np.eye(n) + (both * k).sum(0), lower=True, check_finite=False
            )
        except LinAlgError:
            return 1e10, grad
        inverse = cho_solve(factor, np.eye(n), check_finite=False)
        means = _means(inverse @ W, W, z)
        rest = z - W @ means
        alpha = inverse @ rest
        G = 0.5 * (inverse - np.outer(alpha, alpha))  # d value / d K
        grad[:T] = (G * both * k).sum((1, 2))
        grad[T:a] = (np.tensordot(G * both * (1 + r) * e / 3, D, ([1, 2], [1, 2])) / p.scales**2).ravel()
        for v in range(T - 1):
            dW = np.outer(L[:, v + 1], L[v])[at]  # of W by this rho
            grad[a + v] = 2 * np.einsum("iu,uij,ju->", dW, G * k, W) - alpha @ dW @ means
        if fixed_noise is None:
            grad[-1] = p.noise * np.trace(G)
        off = (theta - prior[:, 0]) / prior[:, 1]
        value = 0.5 * rest @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * means @ means / WIDE**2
        return value + 0.5 * off @ off, grad + off / prior[:, 1]

    begins = []
    for length in (0.3, 1.5):  # a posterior has several peaks: rough and smooth
        begin = prior[:, 0].copy()
        begin[T : T + d] = math.log(length * math.sqrt(d))
        begins.append(np.clip(begin, low, high))
    return Joint(parts(lowest(loss, begins, low, high)), X, y)
