"""Acquisition functions and their optimisation over the space. Smaller values are better throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from luthier.methods.searchers._base import Observation, Space, finite_values, pareto_ranks
from luthier.methods.searchers.model_based._surrogates import Surrogate, fit

POOL = 400  # configurations from which the most promising point is taken; its neighbours are tried then
DIRECTIONS = 64  # along which a hypervolume is measured
DRAWS = 16  # of what was seen and of what may be seen, together
OUTLIER = 4.0  # values worse than the median by so many times its distance from the best count as that


def improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """E max(best - f, 0), f normal."""
    sd = np.maximum(sd, 1e-12)
    u = (best - mean) / sd
    return np.maximum(sd * (u * ndtr(u) + np.exp(-u * u / 2) / np.sqrt(2 * np.pi)), 0.0)


def normals(n: int) -> np.ndarray:
    """[n] numbers that stand for a standard normal one: the middles of n equally likely parts."""
    return ndtri((np.arange(n) + 0.5) / n)


def gain(
    model: Surrogate,
    among: np.ndarray,
    Z: np.ndarray,
    z: np.ndarray,
    itself: bool = True,
    end: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """[c] by how much the best posterior mean among these points is expected to fall when a point of Z is
    measured.

    With the points seen and `itself`, the point measured, it is the expected improvement for values with
    noise: the best is told by means, before and after. With any other points it is the knowledge gradient.
    Simulated: measuring shifts all means along a line of one normal number z [s], the more the stronger they
    covary with what is measured. end: where that is not the end of a run, the mean there [c], and its
    covariance with what is measured [c].
    """
    mean, _ = model.at(among)
    own, variance = model.at(Z)
    scale = np.sqrt(variance + model.noise + 1e-12)
    slopes = model.covariance(among, Z) / scale  # [a, c]
    after = np.full((len(Z), len(z)), np.inf)
    for m, b in zip(mean, slopes):
        np.minimum(after, m + b[:, None] * z, out=after)
    before = float(mean.min())
    if itself:
        own, along = end or (own, variance)
        after = np.minimum(after, own[:, None] + (along / scale)[:, None] * z)
    return before - after.mean(1)


# ---------------------------------------------------------------------- several goals


def directions(draw: np.random.Generator, goals: int, n: int = DIRECTIONS) -> np.ndarray:
    """[n, goals] unit vectors into the positive corner, as spread as they can be drawn."""
    d = np.abs(draw.standard_normal((n, goals))) + 1e-9
    return d / np.linalg.norm(d, axis=1, keepdims=True)


def reach(values: np.ndarray, worst: np.ndarray, along: np.ndarray) -> np.ndarray:
    """[..., n, goals] -> [..., n, directions] how far from `worst` one can go in each direction and be beaten
    by a point.

    The hypervolume is the mean of the farthest point's reach to the power of goals, times the volume of the
    unit ball's positive corner: so improvements of it cost no decomposition into boxes, whatever the number
    of goals.
    """
    far = np.full((*values.shape[:-1], len(along)), np.inf)
    for left, step in zip(np.moveaxis(worst - values, -1, 0), along.T):  # goal by goal
        np.minimum(far, left[..., None] / step, out=far)
    return np.maximum(far, 0.0)


def improvement_of_volume(
    front: np.ndarray, new: np.ndarray, worst: np.ndarray, along: np.ndarray
) -> np.ndarray:
    """[s, n, goals] drawn of what was seen, [s, c, goals] of candidates -> [c] the volume they add, up to a
    constant.
    """
    m = front.shape[-1]
    there = reach(front, worst, along).max(1)[:, None]  # [s, 1, directions]
    return np.maximum(reach(new, worst, along) ** m - there**m, 0.0).mean((0, 2))


def of_volume(
    models: Sequence[Surrogate], X: np.ndarray, Y: np.ndarray, draw: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """Z [c, features] -> [c] the hypervolume expected to be added to that of X, whose values were Y [n,
    goals].
    """
    worst, along = worst_of(Y), directions(draw, len(models))
    # a goal's unit must not decide which directions it is seen from
    unit = np.array([m.spread for m in models])
    n, normal = len(X), [draw.standard_normal((DRAWS, len(m.X) + 4 * POOL)) for m in models]

    def score(Z: np.ndarray) -> np.ndarray:
        points = np.concatenate([X, Z])
        drawn = np.stack([m.draws(points, e[:, : len(points)]) for m, e in zip(models, normal)], -1) / unit
        return improvement_of_volume(drawn[:, :n], drawn[:, n:], worst / unit, along)

    return score


def worst_of(values: np.ndarray) -> np.ndarray:
    """[goals] the point from which a volume is taken: a tenth of its span behind the worst of the front."""
    front = values[pareto_ranks(values) == 0]
    low, high = (
        (front.min(0), front.max(0)) if len(np.unique(front, axis=0)) > 1 else (values.min(0), values.max(0))
    )
    span = np.where(high > low, high - low, np.maximum(np.ptp(values, axis=0), 1e-9))
    return low + 1.1 * span


# ---------------------------------------------------------------------- models of observations


def vectors(space: Space, history: Sequence[Observation]) -> np.ndarray:
    return np.array([space.encode(s.point) for s in history])


def values_of(history: Sequence[Observation]) -> np.ndarray:
    """[n, goals] without numbers so bad that only they would count."""
    out = finite_values(np.array([s.values for s in history]))
    middle, best = np.median(out, axis=0), out.min(0)
    return np.where(middle > best, np.minimum(out, middle + OUTLIER * (middle - best)), out)


def allowed(X: np.ndarray, history: Sequence[Observation]) -> Callable[[np.ndarray], np.ndarray | float]:
    """How likely constraints are kept to. What keeps to them stands as far inside as the others, typically,
    do outside.
    """
    violation = np.array([s.violation for s in history])
    if not (violation > 0).any():
        return lambda Z: 1.0
    model = fit(X, np.where(violation > 0, violation, -np.median(violation[violation > 0])))

    def likely(Z: np.ndarray) -> np.ndarray:
        mean, variance = model.at(Z)
        return ndtr(-mean / np.sqrt(variance + 1e-12))

    return likely


# ---------------------------------------------------------------------- the most promising point


def first(space: Space, n: int, i: int, draw: np.random.Generator) -> dict:
    """The i-th of n points that cover every setting evenly (a Latin hypercube)."""
    cells = np.stack([draw.permutation(n) + draw.random(n) for _ in space.dims], 1) / n
    return space.decode(cells[i % n])


def most(
    space: Space,
    score: Callable[[np.ndarray], np.ndarray],
    around: np.ndarray,
    new: Callable[[np.ndarray], np.ndarray],
    draw: np.random.Generator,
) -> np.ndarray:
    """The vector of the highest score: of points drawn anywhere and around others, then of the neighbours of
    the best.

    score: [c, features] -> [c]. new: [c, features] -> which of them were not measured before; where all were,
    any will do.
    """
    pool = np.concatenate(
        [draw.random((POOL // 2, len(space.dims))), _near(around, POOL // 2, (0.3, 0.1, 0.03), draw)]
    )
    pool = _canonical(space, pool)
    scores = _scored(space, score, new, pool)
    for width in (0.1, 0.03, 0.01):
        top = pool[np.argsort(-scores, kind="stable")[:5]]
        more = _canonical(space, _near(top, POOL // 8, (width,), draw))
        pool, scores = (
            np.concatenate([top, more]),
            np.concatenate([np.sort(scores)[::-1][:5], _scored(space, score, new, more)]),
        )
    return pool[int(np.argmax(scores))]


def _scored(space: Space, score: Callable, new: Callable, pool: np.ndarray) -> np.ndarray:
    Z = space.features(pool)
    return np.where(new(Z), score(Z), -np.inf)


def _near(around: np.ndarray, n: int, widths: tuple[float, ...], draw: np.random.Generator) -> np.ndarray:
    """n vectors near some, each other in one setting or a few; now and then anywhere in it."""
    base = around[draw.integers(len(around), size=n)]
    d = base.shape[1]
    moved = draw.random((n, d)) < max(0.4, 1 / d)
    moved[np.arange(n), draw.integers(d, size=n)] = True
    step = base + draw.standard_normal((n, d)) * draw.choice(widths, size=(n, 1))
    far = draw.random((n, d)) < 0.15
    return np.clip(np.where(moved, np.where(far, draw.random((n, d)), step), base), 0.0, 1.0)


def _canonical(space: Space, pool: np.ndarray) -> np.ndarray:
    """With settings that do not count at their default."""
    return (
        np.array([space.encode(space.decode(v)) for v in pool]) if any(d.when for d in space.dims) else pool
    )


def unmeasured(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    measured = {x.tobytes() for x in X.round(6)}
    return lambda Z: np.array([z.tobytes() not in measured for z in Z.round(6)])
