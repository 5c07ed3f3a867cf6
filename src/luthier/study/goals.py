"""What a search is after, and what it must keep to: `quality,forgetting,parameters,memory,time`, `memory <=
8GB`.

Any metric that a run measures is a goal by its own name. Inside a search every goal is the better the
smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from luthier.errors import RecipeError
from luthier.registry import did_you_mean, find, former_metrics, metrics
from luthier.registry import metric as metric_of

QUALITY = "quality"
NAMED = {
    "forgetting": "retention_loss",
    "parameters": "trained",
    "memory": "peak_memory_mb",
    "time": "seconds",
}
UNITS = {
    "memory": {"": 1, "MB": 1, "GB": 1024, "TB": 1024**2},
    "time": {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600},
    "parameters": {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9},
}


@dataclass(frozen=True)
class Goal:
    """A metric and which way is better. With several metrics: a front, told by one number of it."""

    name: str
    metric: str
    up: bool
    front: tuple[str, ...] = ()  # of what each run's front is made
    worst: tuple[float, ...] = ()  # the point from which its volume is taken, where it is told by that
    told: str = "hypervolume"  # by what the front is told, one of FRONTS

    def value(self, found: Mapping[str, float]) -> float:
        """Out of a run's numbers, the smaller the better; inf where it is missing or no number."""
        x = found.get(self.metric, math.nan)
        return math.inf if not math.isfinite(x) else -x if self.up else float(x)

    def shown(self, value: float) -> float:
        """The way back."""
        return -value if self.up else value


@dataclass(frozen=True)
class Limit:
    """`memory <= 8GB`."""

    said: str
    metric: str
    most: bool  # at most; else at least
    value: float

    def over(self, found: Mapping[str, float]) -> float:
        """By how much it is overstepped, as a share of the limit; 0: not."""
        x = found.get(self.metric, math.nan)
        if math.isnan(x):
            return 1.0
        return max(0.0, (x - self.value) if self.most else (self.value - x)) / (abs(self.value) or 1.0)


def better_up(metric: str) -> bool:
    """Is more of a metric better? Refuses one of which neither is."""
    up = metric_of(metric).higher_is_better
    if up is None:
        known = [*NAMED, QUALITY, *metrics(), *former_metrics()]
        raise RecipeError(
            f"--goals: of '{metric}' neither more nor less is better{did_you_mean(metric, known)}"
        )
    return up


FRONT = re.compile(r"(front|hypervolume|utility|sparsity)\(([^()@]+)(?:@([^()@]+))?\)")
FRONTS = {"hypervolume": True, "utility": True, "sparsity": False}  # numbers of a front: is more better?


def goals(
    said: Sequence[str], quality: str, plan: Mapping[str, float | None] = MappingProxyType({})
) -> tuple[Goal, ...]:
    """quality: the metric that this word stands for. plan: the metrics of which the recipe's plan makes a
    front, and where the volume of each begins, if the recipe says."""
    words = [w.strip() for text in said for w in re.split(r",(?![^(]*\))", text) if w.strip()] or [QUALITY]
    if len(set(words)) < len(words):
        raise RecipeError(f"--goals: {', '.join(words)} names a goal twice")
    return tuple(
        _front(word) if "(" in word else _own(word, plan) if word in FRONTS else _plain(word, quality)
        for word in words
    )


def _plain(word: str, quality: str) -> Goal:
    metric = quality if word == QUALITY else NAMED.get(word, word)
    return Goal(word, metric, better_up(metric))


def _front(word: str) -> Goal:
    """front(accuracy, retention_loss @ 0, 5): the volume that each run's front covers; utility(...),
    sparsity(...): see FRONTS.
    """
    found = FRONT.fullmatch(word.replace(" ", ""))
    if not found:
        raise RecipeError(f"--goals: '{word}' is not a front such as front(accuracy, retention_loss @ 0, 5)")
    told = "hypervolume" if found[1] == "front" else found[1]
    metrics = tuple(NAMED.get(m, m) for m in found[2].split(","))
    ups = [better_up(m) for m in metrics]
    try:
        worst = tuple(float(x) for x in found[3].split(",")) if found[3] else ()
    except ValueError:
        raise RecipeError(
            f"--goals: '{found[3]}' is no point; give a number for each of {', '.join(metrics)}"
        ) from None
    if told != "hypervolume":
        if worst:
            raise RecipeError(
                f"--goals: {word}: only a volume is taken from a point; leave out what is behind the @"
            )
        return Goal(word.replace(" ", ""), word.replace(" ", ""), FRONTS[told], metrics, told=told)
    if not worst and all(metric_of(m).is_share for m in metrics):
        worst = tuple(0.0 if up else 1.0 for up in ups)
    if len(worst) != len(metrics):
        raise RecipeError(
            f"--goals: {word} needs a number for each of {', '.join(metrics)} that is worse than anything"
            " measured, behind an @: the volume is taken from there, the same for all configurations"
        )
    return Goal(word.replace(" ", ""), word.replace(" ", ""), True, metrics, worst)


def _own(word: str, plan: Mapping[str, float | None]) -> Goal:
    """`hypervolume`, `utility` or `sparsity` alone: of the front that the recipe's own plan makes."""
    if not plan:
        raise RecipeError(
            f"--goals: '{word}' is of a front, and the recipe's plan makes none (see plan 'front'); or say of"
            f" what: {word}(...)"
        )
    if word == "hypervolume" and (lacking := [m.removeprefix("goal/") for m, w in plan.items() if w is None]):
        raise RecipeError(
            "--goals: a hypervolume is taken from one point in all trials; give plan 'front' a `worst` for"
            f" {', '.join(lacking)}, lower than anything a trial will reach"
        )
    worst = tuple(float(w or 0) for w in plan.values()) if word == "hypervolume" else ()
    return Goal(word, f"{word}({','.join(plan)})", FRONTS[word], tuple(plan), worst, word)


def _usable(goal: Goal, points: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """The points that have all metrics of a front, the larger the better."""
    signs = [1.0 if better_up(m) else -1.0 for m in goal.front]
    return [
        [s * float(p[m]) for s, m in zip(signs, goal.front)]
        for p in points
        if all(m in p for m in goal.front)
    ]


def fold(goal: Goal, points: Sequence[Mapping[str, float]]) -> float | None:
    """A run's front as one number; None where no point has all its metrics, nan where one is no number."""
    usable = _usable(goal, points)
    if not usable:
        return None
    if not all(math.isfinite(x) for p in usable for x in p):
        return math.nan
    worst = [w if better_up(m) else -w for w, m in zip(goal.worst, goal.front)]
    return find("plan", "front").figure(goal.told, usable, worst)


def below(goal: Goal, points: Sequence[Mapping[str, float]]) -> str:
    """What lies below the point from which a front's volume is taken, in words: the volume is blind to how
    much.
    """
    for metric, worst in zip(goal.front, goal.worst):
        values = [float(p[metric]) for p in points if all(m in p for m in goal.front)]
        least = (min if better_up(metric) else max)(values, default=worst)
        if least < worst if better_up(metric) else least > worst:
            return (
                f"{metric} {least:.4g} lies beyond {worst:.4g}, from where the volume of '{goal.name}' is"
                " taken"
            )
    return ""


LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+\d.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*")


def limits(said: Sequence[str], quality: str) -> tuple[Limit, ...]:
    made = []
    for text in [t for each in said for t in re.split(r",| and ", each) if t.strip()]:
        found = LIMIT.fullmatch(text)
        if not found:
            raise RecipeError(f"--where: '{text}' is not a limit such as memory <= 8GB or accuracy >= 90%")
        name, sign, number, unit = found.groups()
        metric = quality if name == QUALITY else NAMED.get(name, name)
        alias = next((k for k, v in NAMED.items() if v == metric), name)
        units = UNITS.get(alias, {"": 1, "%": 0.01})
        if unit not in units:
            raise RecipeError(
                f"--where: {name} is not counted in '{unit}' (there is: {', '.join(u for u in units if u)})"
            )
        if alias not in UNITS and metric not in (*metrics(), *former_metrics()) and "/" not in metric:
            raise RecipeError(
                f"--where: nothing measures '{name}'{did_you_mean(name, [*NAMED, QUALITY, *metrics(), *former_metrics()])}"
            )
        made.append(Limit(" ".join(text.split()), metric, sign[0] == "<", float(number) * units[unit]))
    return tuple(made)
