"""A search space, observations in it, and the kind's protocol: a searcher is a function from all observations
so far to the next configuration to measure.

A searcher has no state between two suggestions. So a search that was killed continues as if it had not been,
and the same history and seed always lead to the same suggestion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from luthier import compat
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.registry import family

# ---------------------------------------------------------------------- the space


@dataclass(frozen=True)
class Dim:
    """One setting: a range, or choices."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False  # whole numbers only
    choices: tuple = ()  # in place of a range
    ordered: bool = False  # choices ascend: near ones are alike
    default: Any = None
    # it counts only where another setting has this value: ("tuner", "lora")
    when: tuple[str, Any] | None = None

    def __post_init__(self):
        if not self.choices and not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ValueError(
                f"{self.name}: {self.low} to {self.high} is not a range{' with a logarithm' * self.log}"
            )

    @property
    def start(self) -> Any:
        """The default, or the middle."""
        return self.at(0.5) if self.default is None else self.default

    def at(self, u: float) -> Any:
        """The value at 0..1 of the way."""
        u = min(max(float(u), 0.0), 1.0)
        if self.choices:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        low, high = (
            (self.low - 0.5, self.high + 0.5) if self.whole and not self.log else (self.low, self.high)
        )
        value = (
            math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
            if self.log
            else low + u * (high - low)
        )
        return (
            int(min(max(round(value), self.low), self.high))
            if self.whole
            else min(max(value, self.low), self.high)
        )

    def of(self, value: Any) -> float:
        """0..1: the way back."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high = (
            (self.low - 0.5, self.high + 0.5) if self.whole and not self.log else (self.low, self.high)
        )
        u = (
            (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
            if self.log
            else (value - low) / (high - low)
        )
        return min(max(float(u), 0.0), 1.0)

    def has(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high
        )


@dataclass(frozen=True)
class Space:
    """Settings, those that others depend on first."""

    dims: tuple[Dim, ...]

    def walk(self, choose: Callable[[Dim], Any], everything: bool = False) -> dict[str, Any]:
        """Choose each setting that counts under those chosen before it; with everything, the others too."""
        point: dict[str, Any] = {}
        for dim in self.dims:
            if everything or dim.when is None or point.get(dim.when[0]) == dim.when[1]:
                point[dim.name] = choose(dim)
        return point

    def active(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Without the settings that do not count; what is missing or out of range at its default."""
        return self.walk(lambda d: point[d.name] if d.name in point and d.has(point[d.name]) else d.start)

    def start(self) -> dict[str, Any]:
        return self.walk(lambda d: d.start)

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        return self.walk(lambda d: d.at(rng.random()))

    def encode(self, point: Mapping[str, Any]) -> np.ndarray:
        """[dims] in 0..1; settings that do not count stand at their default."""
        return np.array([d.of(point.get(d.name, d.start)) for d in self.dims])

    def decode(self, vector: np.ndarray) -> dict[str, Any]:
        by_name = {d.name: u for d, u in zip(self.dims, vector, strict=True)}
        return self.walk(lambda d: d.at(by_name[d.name]))

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """[n, dims] in 0..1 -> what distances are taken of: whole numbers and steps where they are, a choice
        by a coordinate for each.
        """
        columns = []
        for d, u in zip(self.dims, vectors.T, strict=True):
            if d.choices and d.ordered:
                columns.append(np.array([d.of(d.at(x)) for x in u]))
            elif d.choices:
                at = np.minimum((u * len(d.choices)).astype(int), len(d.choices) - 1)
                columns += [(at == i).astype(float) for i in range(len(d.choices))]
            else:
                columns.append(np.array([d.of(d.at(x)) for x in u]) if d.whole else u)
        return np.stack(columns, 1)


# ---------------------------------------------------------------------- observations and suggestions


@dataclass(frozen=True)
class Observation:
    """A configuration that was measured after a fraction of its steps."""

    number: int  # of the configuration: the same one further on keeps its number
    point: Mapping[str, Any]
    values: tuple[float, ...]  # of each goal, the smaller the better; inf where it diverged
    share: float = 1.0
    violation: float = 0.0  # by how much constraints are overstepped, in shares of what they allow
    marks: Mapping[str, Any] = field(default_factory=dict)  # what the searcher noted when it suggested it


@dataclass(frozen=True)
class Suggestion:
    """What to measure next."""

    point: dict[str, Any]
    share: float = 1.0
    number: int | None = None  # go on with this configuration; None: a new one
    marks: dict[str, Any] = field(default_factory=dict)


@family
class Searcher:
    """Family: `ask` returns the next configuration. Searchers that measure after part of the steps declare it
    by `shares`.
    """

    @property
    def shares(self) -> tuple[float, ...]:
        """After which shares of the steps it measures."""
        return (1.0,)

    def ask(self, space: Space, history: Sequence[Observation], goals: int, clock: Clock) -> Suggestion:
        raise NotImplementedError


def rng(clock: Clock, *names: object) -> np.random.Generator:
    return np.random.default_rng(clock.derive_seed(*names, at=0))


# ---------------------------------------------------------------------- judging observations


def finite_values(values: np.ndarray) -> np.ndarray:
    """[n, goals] with what diverged a little worse than the worst that did not."""
    out = values.astype(float).copy()
    for column in out.T:
        good = column[np.isfinite(column)]
        worst = (good.max() + (np.ptp(good) or 1.0)) if len(good) else 1.0
        column[~np.isfinite(column)] = worst
    return out


def pareto_ranks(values: np.ndarray) -> np.ndarray:
    """[n, goals] without nan -> [n] 0 for the points that no other dominates, 1 for those that only these
    dominate, and so on.
    """
    import moocore

    return np.asarray(moocore.pareto_rank(values), int)


def crowding(values: np.ndarray) -> np.ndarray:
    """[n] how far apart the neighbours of each are, goal by goal: the ends of every goal infinitely."""
    n = len(values)
    out = np.zeros(n)
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = (column[order[-1]] - column[order[0]]) or 1.0
        out[order[[0, -1]]] = np.inf
        if n > 2:
            out[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return out


def best_first(history: Sequence[Observation]) -> list[Observation]:
    """Best first: what keeps to the constraints, then by layer, then the less crowded."""
    if not history:
        return []
    values = finite_values(np.array([s.values for s in history]))
    violation = np.array([s.violation for s in history])
    level = pareto_ranks(values).astype(float)
    far = np.zeros(len(history))
    for one in np.unique(level):
        where = np.flatnonzero(level == one)
        far[where] = crowding(values[where])
    order = np.lexsort((-far if values.shape[1] > 1 else values[:, 0], level, np.maximum(violation, 0)))
    return [history[i] for i in order]


def latest(history: Sequence[Observation]) -> list[Observation]:
    """Of each configuration what was measured last."""
    last: dict[int, Observation] = {}
    for s in history:
        if s.number not in last or s.share >= last[s.number].share:
            last[s.number] = s
    return list(last.values())


def at_common_share(history: Sequence[Observation], least: int) -> list[Observation]:
    """What was measured after the largest share that `least` configurations reached: numbers of different
    shares do not compare.
    """
    by = {
        share: [s for s in history if s.share == share]
        for share in sorted({s.share for s in history}, reverse=True)
    }
    return next((some for some in by.values() if len(some) >= least), max(by.values(), key=len, default=[]))


# ---------------------------------------------------------------------- Optuna


def load_optuna() -> Any:
    """The library, quiet for as long as a search lasts. Raises RecipeError where it is missing."""
    try:
        import optuna
    except ImportError:
        raise RecipeError("searching needs optuna: pip install 'luthier[search]'") from None
    verbosity = optuna.logging.get_verbosity()
    if compat.active() and verbosity < optuna.logging.WARNING:
        compat.on_exit(partial(optuna.logging.set_verbosity, verbosity))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def optuna_distributions(space: Space) -> dict[str, Any]:
    """Setting -> Optuna's distribution of it."""
    lib = load_optuna().distributions
    distributions: dict[str, Any] = {}
    for d in space.dims:
        if d.choices:
            distributions[d.name] = lib.CategoricalDistribution(d.choices)
        elif d.whole:
            distributions[d.name] = lib.IntDistribution(int(d.low), int(d.high), log=d.log)
        else:
            distributions[d.name] = lib.FloatDistribution(d.low, d.high, log=d.log)
    return distributions
