"""What a search improves and what it must keep within: `quality,forgetting,parameters,memory,time`,
`memory <= 8GB`.

Any metric that a run measures is a goal by its own name. Inside a search every goal is the better the
smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType

import numpy as np

from luthier.errors import RecipeError
from luthier.registry import did_you_mean, find, former_metrics, metrics
from luthier.registry import metric as metric_of

QUALITY = "quality"
ALIASES = {
    "forgetting": "retention_loss",
    "parameters": "trained",
    "memory": "peak_memory_mb",
    "time": "seconds",
}
UNITS = {
    "peak_memory_mb": {"": 1, "MB": 1, "GB": 1024, "TB": 1024**2},
    "seconds": {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600},
    "trained": {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9},
}
# figures of a front, and whether more is better
FIGURES = {"hypervolume": True, "utility": True, "sparsity": False}
FRONT = re.compile(r"(front|hypervolume|utility|sparsity)\(([^()@]+)(?:@([^()@]+))?\)")
LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+\d.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Goal:
    """A metric and which way is better. With several metrics: a figure of the front that a run makes."""

    name: str
    metric: str
    up: bool  # is more better?
    front: tuple[str, ...] = ()  # the metrics of which each run's front is made
    worst: tuple[float, ...] = ()  # the point from which its hypervolume is taken
    figure: str = "hypervolume"  # one of FIGURES

    def value(self, metrics: Mapping[str, float]) -> float:
        """From a run's metrics, the smaller the better; inf where it is missing or not finite."""
        x = metrics.get(self.metric, math.nan)
        if not math.isfinite(x):
            return math.inf
        return -x if self.up else float(x)

    def shown_value(self, value: float) -> float:
        """The metric of a value."""
        return -value if self.up else value


@dataclass(frozen=True)
class Limit:
    """`memory <= 8GB`."""

    text: str
    metric: str
    most: bool  # at most; else at least
    value: float

    def violation(self, metrics: Mapping[str, float]) -> float:
        """By how much it is exceeded, as a share of the limit; 0: it is kept; 1 where it was not measured."""
        x = metrics.get(self.metric, math.nan)
        if math.isnan(x):
            return 1.0
        excess = x - self.value if self.most else self.value - x
        return max(0.0, excess) / (abs(self.value) or 1.0)


def higher_is_better(metric: str) -> bool:
    """Is more of a metric better? Raises RecipeError for one of which neither is."""
    higher = metric_of(metric).higher_is_better
    if higher is None:
        hint = did_you_mean(metric, _names())
        raise RecipeError(f"--goals: '{metric}' has no better direction, neither higher nor lower{hint}")
    return higher


def _names() -> list[str]:
    """Every word that is a goal."""
    return [*ALIASES, QUALITY, *metrics(), *former_metrics()]


def _metric_name(word: str) -> str:
    """The metric of an alias, or of a name that a metric had in version 0.1."""
    return ALIASES.get(word) or former_metrics().get(word, word)


# ------------------------------------------------------------------------------------------ goals


def parse_goals(
    texts: Sequence[str], quality: str, plan: Mapping[str, float | None] = MappingProxyType({})
) -> tuple[Goal, ...]:
    """texts: goals, several of them separated by commas; none: `quality`.
    quality: the metric that this word stands for.
    plan: the metrics of which the recipe's plan makes a front, and where the volume of each begins, if the
    recipe says.
    Raises RecipeError for what is no goal.
    """
    # at commas outside of brackets
    words = list(filter(None, map(str.strip, re.split(r",(?![^(]*\))", ",".join(texts)))))
    if len(set(words)) < len(words):
        raise RecipeError(f"--goals: {', '.join(words)} lists a goal twice")
    goals = []
    for word in words or [QUALITY]:
        if "(" in word:
            goals.append(_parse_front(word))
        elif word in FIGURES:
            goals.append(_goal_of_plan(word, plan))
        else:
            metric = quality if word == QUALITY else _metric_name(word)
            goals.append(Goal(word, metric, higher_is_better(metric)))
    return tuple(goals)


def _parse_front(word: str) -> Goal:
    """front(accuracy, retention_loss @ 0, 5): the hypervolume of each run's front above that point;
    utility(...) and sparsity(...): its other figures.
    """
    name = word.replace(" ", "")
    match = FRONT.fullmatch(name)
    if not match:
        raise RecipeError(f"--goals: '{word}' must have the form front(accuracy, retention_loss @ 0, 5)")
    figure = "hypervolume" if match[1] == "front" else match[1]
    axes = tuple(map(_metric_name, match[2].split(",")))
    worst = _parse_point(match[3], axes) if match[3] else ()
    # of shares, the worst there is
    ends = [float(not higher_is_better(axis)) for axis in axes]
    if figure != "hypervolume":
        if worst:
            raise RecipeError(
                f"--goals: {word}: only a hypervolume has a reference point; remove the @ and what follows"
            )
        return Goal(name, name, FIGURES[figure], axes, figure=figure)
    if not worst and all(metric_of(axis).is_share for axis in axes):
        worst = tuple(ends)
    if len(worst) != len(axes):
        raise RecipeError(
            f"--goals: {word} needs a reference point behind an @: for each of"
            f" {', '.join(axes)} a value that is worse than anything a trial reaches"
        )
    return Goal(name, name, True, axes, worst)


def _parse_point(text: str, axes: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise RecipeError(
            f"--goals: '{text}' is not a reference point; give a number for each of {', '.join(axes)}"
        ) from None


def _goal_of_plan(figure: str, plan: Mapping[str, float | None]) -> Goal:
    """`hypervolume`, `utility` or `sparsity` alone: of the front that the recipe's own plan makes."""
    if not plan:
        raise RecipeError(
            f"--goals: '{figure}' describes a Pareto front, but this recipe has no plan"
            f" 'front'; add it, or name the metrics: {figure}(...)"
        )
    worst: tuple[float, ...] = ()
    if figure == "hypervolume":
        lacking = [metric.removeprefix("goal/") for metric, value in plan.items() if value is None]
        if lacking:
            raise RecipeError(
                "--goals: hypervolume needs the same reference point in all trials; set"
                f" `worst` in plan 'front' for {', '.join(lacking)}, to a value lower than any"
                " trial reaches"
            )
        worst = tuple(float(value or 0) for value in plan.values())
    return Goal(figure, f"{figure}({','.join(plan)})", FIGURES[figure], tuple(plan), worst, figure)


def front_figure(goal: Goal, points: Sequence[Mapping[str, float]]) -> float | None:
    """The figure of a run's front. points: the metrics of each of its models. None where no point has all
    metrics of the front, nan where one of them is not finite.
    """
    rows = []
    for point in _complete(goal, points):
        rows.append([point[metric] for metric in goal.front])
    values = np.array(rows, float)
    # for each metric 1 where more is better, else -1
    signs = np.array([2.0 * higher_is_better(metric) - 1.0 for metric in goal.front])
    if not values.size:
        return None
    if not np.isfinite(values).all():
        return math.nan
    worst = signs * np.array(goal.worst) if goal.worst else ()
    return find("plan", "front").figure(goal.figure, signs * values, worst)


def _complete(goal: Goal, points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The points that have all metrics of a front."""
    return [point for point in points if point.keys() >= set(goal.front)]


def beyond_worst(goal: Goal, points: Sequence[Mapping[str, float]]) -> str:
    """What lies beyond the point from which a hypervolume is taken, as a sentence: the hypervolume does not
    say how far. Empty where nothing does.
    """
    for metric, worst in zip(goal.front, goal.worst):
        values = [worst, *map(itemgetter(metric), _complete(goal, points))]
        least = min(values) if higher_is_better(metric) else max(values)
        if least != worst:
            return (
                f"{metric} {least:.4g} is worse than the reference point {worst:.4g} of the"
                f" hypervolume '{goal.name}'"
            )
    return ""


# ----------------------------------------------------------------------------------------- limits


def parse_limits(texts: Sequence[str], quality: str) -> tuple[Limit, ...]:
    """texts: such as "memory <= 8GB and accuracy >= 90%". Raises RecipeError for what is no limit."""
    limits = []
    for part in re.split(r",| and ", ",".join(texts)):
        if part.strip():
            limits.append(_parse_limit(part, quality))
    return tuple(limits)


def _parse_limit(text: str, quality: str) -> Limit:
    match = LIMIT.fullmatch(text)
    if not match:
        raise RecipeError(f"--constraint: '{text}' must have the form memory <= 8GB or accuracy >= 90%")
    name, sign, number, unit = match.groups()
    metric = quality if name == QUALITY else _metric_name(name)
    units = UNITS.get(metric, {"": 1, "%": 0.01})
    if unit not in units:
        names = ", ".join(filter(None, units))
        raise RecipeError(f"--constraint: {name} is not measured in '{unit}'; use {names}")
    if metric not in metrics() and "/" not in metric:
        hint = did_you_mean(name, _names())
        raise RecipeError(f"--constraint: no evaluator measures '{name}'{hint}")
    return Limit(" ".join(text.split()), metric, sign[0] == "<", float(number) * units[unit])
