"""The numbers of a claim's runs, and the verdict on what was expected of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.methods.evaluators._base import per_example_file
from luthier.registry import did_you_mean, metric
from luthier.storage import files
from luthier.study.reproduce.spec import BEFORE, FAILS, HOLDS, UNDECIDED, Claim, Expectation

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
# of each of two looks, after the pilot and after the seeds that its spread asks for: together they are wrong
# no more often than one at LEVEL
TWO_LOOKS = 0.975
BOOTSTRAPS = 10_000
FLOOR = 0.05  # a share below it, or as near to 1, does not tell arms apart
# stats of a run that every result keeps
COSTS = ("stats.seconds", "stats.peak_memory_mb", "stats.moving", "stats.steps", "stats.data_rows")


@dataclass
class RunNumbers:
    """What one run measured."""

    before: dict[str, float]
    after: dict[str, float]
    stats: dict[str, Any] = field(default_factory=dict)
    duration: float = 0.0  # seconds, loading and evaluating included
    log: list[dict[str, Any]] = field(default_factory=list)  # what training logged, step by step
    folder: Path | None = None  # of the run, with what it measured on each row

    def per_row(self, before: bool = False) -> dict[str, dict[str, float]]:
        """Metric -> row id -> its value; empty where nothing was stored for each row."""
        if self.folder is None:
            return {}
        path = per_example_file(self.folder, "before" if before else "after")
        if not path.is_file():
            return {}
        return files.read_object(path)

    def value(self, claim: Claim, arm: str, metric: str, before: bool = False) -> float:
        """One number by its name. Raises RecipeError where the run did not measure it."""
        values = self.values(before)
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if metric not in numbers:
            raise claim.error(f"arm {arm} measured no '{metric}'{did_you_mean(metric, numbers)}")
        return numbers[metric]

    def values(self, before: bool = False) -> dict[str, Any]:
        """Every number by its name: metrics, stats.NAME (of the whole run, so not before training), log.NAME
        (the first step's, or the mean of the last quarter of the steps).
        """
        values: dict[str, Any] = dict(self.before if before else self.after)
        if not before:
            for name, value in self.stats.items():
                values[f"stats.{name}"] = value
        quarter = max(1, len(self.log) // 4)
        steps = self.log[:1] if before else self.log[-quarter:]
        logged: dict[str, list[float]] = {}
        for step in steps:
            for name, value in step.items():
                if isinstance(value, (int, float)):
                    logged.setdefault(name, []).append(value)
        for name, series in logged.items():
            if len(series) == len(steps):
                values[f"log.{name}"] = statistics.fmean(series)
        return values

    def summary(self, metrics: set[str]) -> dict[str, float]:
        """What a result keeps of the run: metrics before and after, its cost, and what was judged."""
        start, end = self.values(before=True), self.values()
        values = {}
        for name, value in end.items():
            detail = "/" in name or name.startswith(("stats.", "log."))
            if name in metrics or name in COSTS or not detail:
                values[name] = value
        for name in list(values):
            if name in start and name not in COSTS:
                values[f"{BEFORE}.{name}"] = start[name]
        return {name: rounded(value) for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def judge(
    claim: Claim, numbers: Mapping[tuple[str, int], RunNumbers], level: float = LEVEL
) -> list[dict[str, Any]]:
    """Each expectation against the numbers of every (arm, seed). level: of the intervals."""
    return [_judge(claim, expectation, numbers, level) for expectation in claim.expectations]


def _judge(
    claim: Claim, expectation: Expectation, numbers: Mapping[tuple[str, int], RunNumbers], level: float
) -> dict[str, Any]:
    """One expectation: the difference of its two arms, paired by seed; by seed and row where all seeds
    measured the same rows.
    """
    import numpy as np

    from luthier.study.statistics import bootstrap_interval, paired_difference, t_interval

    left, right = _by_seed(claim, expectation, numbers)
    differences = [a - b for a, b in zip(left, right)]
    mean = statistics.fmean(differences)
    matrices = _by_row(claim, expectation, numbers, left, right)
    if matrices is None:
        low, high = t_interval(differences, level)
        resampled = np.array(differences)[:, None]
    else:
        difference = paired_difference(*matrices, level)
        low, high = difference.low, difference.high
        resampled = matrices[0] - matrices[1]
    judged = {
        "expect": expectation.text,
        "metric": expectation.metric,
        "verdict": expectation.verdict(low, high),
        expectation.left: rounded(left),
        expectation.right: rounded(right),
        "difference": rounded(mean),
        "level": level,
        "interval": rounded([low, high]),
        "bootstrap": rounded(bootstrap_interval(resampled, BOOTSTRAPS)),
        "deviation": rounded(statistics.stdev(differences)),
    }
    if matrices is not None:
        judged["rows"] = matrices[0].shape[1]
    reason = no_room(expectation, left, right)
    if reason and judged["verdict"] != HOLDS:
        judged |= {"verdict": UNDECIDED, "no_room": reason}
    return judged


def _sources(expectation: Expectation) -> list[tuple[str, bool]]:
    """For the left and the right side: the arm whose runs are read, and whether before training."""
    sources = []
    for arm, other in ((expectation.left, expectation.right), (expectation.right, expectation.left)):
        # `before` is the other arm of the expectation, before training
        sources.append((other, True) if arm == BEFORE else (arm, False))
    return sources


def _seeds(numbers: Mapping[tuple[str, int], RunNumbers]) -> list[int]:
    return sorted({seed for _, seed in numbers})


def _by_seed(
    claim: Claim, expectation: Expectation, numbers: Mapping[tuple[str, int], RunNumbers]
) -> list[list[float]]:
    """The metric of both sides, a number for each seed."""
    sides = []
    for arm, before in _sources(expectation):
        values = []
        for seed in _seeds(numbers):
            values.append(numbers[arm, seed].value(claim, arm, expectation.metric, before))
        sides.append(values)
    return sides


def _by_row(
    claim: Claim,
    expectation: Expectation,
    numbers: Mapping[tuple[str, int], RunNumbers],
    left: Sequence[float],
    right: Sequence[float],
) -> tuple[np.ndarray, np.ndarray] | None:
    """The metric of both sides as [seeds, rows]; None where seeds measured different rows, where it is no
    mean over rows, or where one run did not store it for every row.
    """
    import numpy as np

    if not claim.same_rows(expectation.metric):
        return None
    matrices, rows = [], None
    for (arm, before), means in zip(_sources(expectation), (left, right)):
        lines = []
        for seed, mean in zip(_seeds(numbers), means):
            values = numbers[arm, seed].per_row(before).get(expectation.metric, {})
            rows = sorted(values) if rows is None else rows
            if not rows or values.keys() != set(rows):
                return None
            lines.append([values[row] for row in rows])
            if not np.isclose(np.mean(lines[-1]), mean, rtol=1e-4, atol=1e-6):
                return None
        matrices.append(np.array(lines, float))
    return matrices[0], matrices[1]


def no_room(expectation: Expectation, left: Sequence[float], right: Sequence[float]) -> str:
    """Why a task leaves a metric no room to differ in the claimed direction; empty where it does."""
    if expectation.sign == "=":
        return ""
    if len({*left, *right}) == 1:
        return "all runs measured the same"
    declared = metric(expectation.metric)
    if "." in expectation.metric or declared.better is None:
        return ""
    ours, theirs = statistics.fmean(left), statistics.fmean(right)
    graded = declared.is_share and declared.higher_is_better
    if graded and max(ours, theirs) < FLOOR:
        return f"both sides are at the floor, below {FLOOR:.0%}"
    if graded and min(ours, theirs) > 1 - FLOOR:
        return f"both sides are at the ceiling, above {1 - FLOOR:.0%}"
    room = 1 - theirs if declared.is_share else math.inf
    if expectation.sign == "<":
        room = theirs
    if room < expectation.effect:
        return f"{expectation.right} leaves room for {room:.3g} only"
    return ""


def seeds_needed(judged: Sequence[Mapping[str, Any]], claim: Claim, most: int) -> int:
    """How many seeds make the interval of each undecided expectation narrow enough: half as wide, on either
    side, as the least effect, or as a hundredth of what was measured where that is more. By the spread of
    the pilot alone, not by its differences.
    """
    from luthier.study.statistics import seeds_for

    needed = 2
    for expectation, one in zip(claim.expectations, judged):
        if one["verdict"] == UNDECIDED and "no_room" not in one:
            size = abs(statistics.fmean(one[expectation.right]))
            half_width = max(abs(expectation.effect) / 2, size / 100)
            if half_width:
                needed = max(needed, seeds_for(one["deviation"], half_width, one["level"], most))
    return needed


def combine(verdicts: Sequence[str]) -> str:
    """Of several expectations: all must hold, and one that fails is enough."""
    if FAILS in verdicts:
        return FAILS
    if UNDECIDED in verdicts:
        return UNDECIDED
    return HOLDS


def rounded(value: Any) -> Any:
    """Five significant digits: enough to check an interval by."""
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value
