"""What a search is after, and what it must keep to: `quality,forgetting,parameters,memory,time`, `memory <= 8GB`.

Any metric that a run measures is a goal by its own name. Inside a search every goal is the better the smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.method import RecipeError, meant
from luthier.report.numbers import METRICS, says

QUALITY = "quality"
NAMED = {"forgetting": "elsewhere_loss", "parameters": "trained", "memory": "peak_memory_mb", "time": "seconds"}
COSTS = {"trained": False, "peak_memory_mb": False, "seconds": False, "tokens_per_second": True}  # is more better?
UNITS = {
    "memory": {"": 1, "MB": 1, "GB": 1024, "TB": 1024**2},
    "time": {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600},
    "parameters": {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9},
}


@dataclass(frozen=True)
class Goal:
    """A metric and which way is better. With several metrics: a front, told by the volume it covers up to `worst`."""

    name: str
    metric: str
    up: bool
    front: tuple[str, ...] = ()  # of what each run's front is made
    worst: tuple[float, ...] = ()  # the point from which its volume is taken

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
    up = COSTS[metric] if metric in COSTS else says(metric).up
    if up is None:
        known = [*NAMED, QUALITY, *METRICS]
        raise RecipeError(f"--goals: of '{metric}' neither more nor less is better{meant(metric, known)}")
    return up


FRONT = re.compile(r"(?:front|hypervolume)\(([^()@]+)(?:@([^()@]+))?\)")


def goals(said: Sequence[str], quality: str) -> tuple[Goal, ...]:
    """quality: the metric that this word stands for."""
    words = [w.strip() for text in said for w in re.split(r",(?![^(]*\))", text) if w.strip()] or [QUALITY]
    if len(set(words)) < len(words):
        raise RecipeError(f"--goals: {', '.join(words)} names a goal twice")
    return tuple(_front(word) if "(" in word else _plain(word, quality) for word in words)


def _plain(word: str, quality: str) -> Goal:
    metric = quality if word == QUALITY else NAMED.get(word, word)
    return Goal(word, metric, better_up(metric))


def _front(word: str) -> Goal:
    """front(accuracy, elsewhere_accuracy @ 0, 0): the volume that each run's front covers."""
    found = FRONT.fullmatch(word.replace(" ", ""))
    if not found:
        raise RecipeError(f"--goals: '{word}' is not a front such as front(accuracy, elsewhere_loss @ 0, 5)")
    metrics = tuple(NAMED.get(m, m) for m in found[1].split(","))
    ups = [better_up(m) for m in metrics]
    try:
        worst = tuple(float(x) for x in found[2].split(",")) if found[2] else ()
    except ValueError:
        raise RecipeError(f"--goals: '{found[2]}' is no point; give a number for each of {', '.join(metrics)}") from None
    if not worst and all(says(m).share for m in metrics):
        worst = tuple(0.0 if up else 1.0 for up in ups)
    if len(worst) != len(metrics):
        raise RecipeError(
            f"--goals: {word} needs a number for each of {', '.join(metrics)} that is worse than anything measured, behind an @: the "
            "volume is taken from there, the same for all configurations"
        )
    return Goal(word.replace(" ", ""), word.replace(" ", ""), True, metrics, worst)


def volume(goal: Goal, points: Sequence[Mapping[str, float]]) -> float:
    """What a run's front covers: the hypervolume of its points from `worst` on."""
    from luthier.paired import hypervolume

    signs = [-1.0 if better_up(m) else 1.0 for m in goal.front]
    usable = [[s * float(p[m]) for s, m in zip(signs, goal.front)] for p in points if all(m in p for m in goal.front)]
    return hypervolume(usable, [s * w for s, w in zip(signs, goal.worst)])


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
            raise RecipeError(f"--where: {name} is not counted in '{unit}' (there is: {', '.join(u for u in units if u)})")
        if alias not in UNITS and metric not in METRICS and metric not in COSTS and "/" not in metric:
            raise RecipeError(f"--where: nothing measures '{name}'{meant(name, [*NAMED, QUALITY, *METRICS])}")
        made.append(Limit(" ".join(text.split()), metric, sign[0] == "<", float(number) * units[unit]))
    return tuple(made)
