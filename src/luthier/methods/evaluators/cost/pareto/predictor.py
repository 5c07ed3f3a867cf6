"""Predicts the measurement of a choice from earlier ones: ridge regression on one-hot choices.

Linear, or with a Gaussian kernel; which of them, and the regularisation, is chosen by leave-one-out error in
closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RIDGES = np.geomspace(1e-4, 1e2, 19)


def onehot(choices: Sequence[int], genes: Sequence[Sequence[int]]) -> np.ndarray:
    """[n, genes] -> [n, all choices]"""
    return np.concatenate(
        [np.eye(n)[column] for n, column in zip(choices, np.array(genes).T, strict=True)], 1
    )


def linear(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return A @ B.T


def gaussian(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Its width is such that two points that differ in all choices are at e^-2."""
    genes = A[:1].sum()
    return np.exp(-2 * (genes - A @ B.T) / genes)


def left_out(K: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """[n] by how much each value is missed by a regression on the others."""
    inverse = np.linalg.inv(K + ridge * np.eye(len(K)))
    return inverse @ y / np.diag(inverse)


def predicted(
    choices: Sequence[int], genes: Sequence[Sequence[int]], values: Sequence[float]
) -> Callable[[Sequence[int]], float]:
    """genes -> the value expected. Values around their mean, so that whoever shrinks wholly says that."""
    X, y = onehot(choices, genes), np.array(values, float)
    mean = y.mean()
    candidates = [
        (float(np.mean(left_out(k(X, X), y - mean, r) ** 2)), i, r)
        for i, k in enumerate((linear, gaussian))
        for r in RIDGES
    ]
    _, i, ridge = min(candidates)
    kernel = (linear, gaussian)[i]
    weights = np.linalg.solve(kernel(X, X) + ridge * np.eye(len(X)), y - mean)
    return lambda g: float(mean + kernel(onehot(choices, [g]), X)[0] @ weights)
