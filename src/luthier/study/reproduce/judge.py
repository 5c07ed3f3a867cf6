"""The numbers of a claim's runs, and the verdict on what was expected of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.registry import did_you_mean
from luthier.study.reproduce.spec import BEFORE, FAILS, HOLDS, UNDECIDED, Claim, Expectation

BOOTSTRAPS = 10_000
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

    def value(self, claim: Claim, arm: str, metric: str, before: bool = False) -> float:
        """One number by its name. Raises RecipeError where the run did not measure it."""
        values = self.values(before)
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if metric not in numbers:
            raise claim.error(f"arm {arm} measured no '{metric}'{did_you_mean(metric, numbers)}")
        return numbers[metric]

    def values(self, before: bool = False) -> dict[str, Any]:
        """Every number by its name: metrics, stats.NAME, log.NAME (the first step's, or the mean of the last
        quarter of the steps).
        """
        values: dict[str, Any] = dict(self.before if before else self.after)
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


def judge(claim: Claim, numbers: Mapping[tuple[str, int], RunNumbers]) -> list[dict[str, Any]]:
    """Each expectation against the numbers of every (arm, seed)."""
    return [_judge(claim, expectation, numbers) for expectation in claim.expectations]


def _judge(
    claim: Claim, expectation: Expectation, numbers: Mapping[tuple[str, int], RunNumbers]
) -> dict[str, Any]:
    """One expectation: the difference of its two arms, paired by seed."""
    import numpy as np

    from luthier.study.statistics import bootstrap_interval, t_interval

    measured: dict[str, list[float]] = {expectation.left: [], expectation.right: []}
    for seed in sorted({seed for _, seed in numbers}):
        for arm, values in measured.items():
            source = arm
            if arm == BEFORE:  # the other arm of the expectation, before training
                (source,) = {expectation.left, expectation.right} - {BEFORE}
            run = numbers[source, seed]
            values.append(run.value(claim, source, expectation.metric, before=arm == BEFORE))
    left, right = measured[expectation.left], measured[expectation.right]
    differences = [a - b for a, b in zip(left, right)]
    low, high = t_interval(differences)
    verdict = expectation.verdict(low, high)
    if expectation.sign != "=" and len({*left, *right}) == 1:  # the metric is at its floor or ceiling
        verdict = UNDECIDED
    return {
        "expect": expectation.text,
        "metric": expectation.metric,
        "verdict": verdict,
        expectation.left: rounded(left),
        expectation.right: rounded(right),
        "difference": rounded(statistics.fmean(differences)),
        "interval": rounded([low, high]),
        "bootstrap": rounded(bootstrap_interval(np.array(differences)[:, None], BOOTSTRAPS)),
    }


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
