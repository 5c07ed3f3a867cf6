"""From the runs' reports to the result: every metric with its interval, every pair of arms with its
difference, the Pareto front, and a sentence that claims no more than the intervals support.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import per_example_file
from luthier.recipe.recipe import Recipe
from luthier.registry import COSTS, did_you_mean
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_difference, format_metric, format_number
from luthier.run.report import plan_runs
from luthier.storage.files import read_json
from luthier.study.compare.spec import ALPHA, FRONT_METRICS, ComparisonSpec, join_names
from luthier.study.statistics import bootstrap_interval, holm, paired_difference, pareto_front

Report = dict[str, Any]
LEAST_GAIN = 0.01  # a smaller gain over the untuned model is next to nothing


@dataclass
class ArmResult:
    """What is known of an arm so far."""

    recipe: Recipe
    runs: dict[int, Path] = field(default_factory=dict)  # seed -> folder
    stopped: str = ""  # why it was stopped early, failed or could not run, if so

    def folders(self) -> list[Path]:
        """Of its runs, in the order of their seeds."""
        return [self.runs[seed] for seed in sorted(self.runs)]

    def describe(self) -> dict[str, Any]:
        """As comparison.json holds it."""
        return {
            "recipe": self.recipe.yaml(),
            "runs": list(map(str, self.folders())),
            "learning_rate": self.recipe.learning_rate,
        }


def judge(spec: ComparisonSpec, results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """The result of a comparison as plain data (comparison.json). Raises RecipeError where no arm measured
    the spec's metric.
    """
    finished: dict[str, ArmResult] = {}
    stopped: dict[str, str] = {}
    reports: list[Report] = []
    for name, arm in results.items():
        if arm.stopped:
            stopped[name] = arm.stopped
        else:
            finished[name] = arm
            reports += map(read_report, arm.folders())
    metrics = _common_metrics(reports)
    table, pairs = _tabulate(finished, [*metrics, *COSTS])
    if finished and spec.metric not in table:
        raise no_metric(spec.metric, table)
    goals = [goal for goal in dict.fromkeys((spec.metric, *FRONT_METRICS)) if goal in table]
    first = next(iter(results.values())).recipe
    data, held_out = "rows given in Python", None
    if isinstance(first.data, (str, dict)):
        data = first.data
    if reports:
        stats = reports[0]["stats"]
        held_out = stats.get("held_out_rows") and stats.get("evaluated_rows", stats["held_out_rows"])
    before, gains = _means_before(reports, metrics), _gains(finished, spec.metric)
    cells, tested = table.get(spec.metric, {}), pairs.get(spec.metric, [])
    return {
        "sentence": sentence(spec.metric, cells, tested, stopped, before.get(spec.metric), gains),
        "metric": spec.metric,
        "table": table,
        "pairs": pairs,
        "front": _front(table, goals, finished),
        "goals": goals,
        "stopped": stopped,
        "before": before,
        "gains": gains,
        "arms": {name: arm.describe() for name, arm in results.items()},
        "seeds": spec.seeds,
        "budget": spec.budget,
        "rows": held_out,
        "model": first.model,
        "data": data,
    }


class NoMetric(RecipeError):
    """No arm measured the metric by which arms are compared."""


def no_metric(name: str, measured: Mapping[str, Any]) -> NoMetric:
    return NoMetric(f"--metric: no arm measured '{name}'{did_you_mean(name, measured)}")


def _tabulate(
    arms: Mapping[str, ArmResult], metrics: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Of each metric that every run has: name -> cell, and the pairs of arms unless it is a cost."""
    table, pairs = {}, {}
    for metric in metrics:
        values = {}
        for name, arm in arms.items():
            matrix = _values(arm, metric)
            if matrix is not None:
                values[name] = matrix
        if len(values) < len(arms):
            continue
        table[metric] = {name: _cell(matrix) for name, matrix in values.items()}
        if metric not in COSTS and "/" not in metric:
            pairs[metric] = _pairs(values)
    return table, pairs


def _common_metrics(reports: Sequence[Report]) -> list[str]:
    """Metrics that every run measured at its end, in the order of the first."""
    common = list(reports[0]["after"]) if reports else []
    for report in reports[1:]:
        common = [name for name in common if name in report["after"]]
    return common


def _means_before(reports: Sequence[Report], metrics: Sequence[str]) -> dict[str, float]:
    """The mean of each metric before training, over the runs that measured it then."""
    means = {}
    for metric in metrics:
        values = [report["before"][metric] for report in reports if metric in report["before"]]
        if values:
            means[metric] = float(np.mean(values))
    return means


def _gains(arms: Mapping[str, ArmResult], metric: str) -> dict[str, dict[str, float]]:
    """Of each arm whose rows were measured before and after: the gain over the untuned model with its
    interval, above 0 where the arm is better.
    """
    higher = metric_of(metric).higher_is_better
    gains = {}
    for name, arm in arms.items():
        before, after = _per_row(arm, "before", metric), _per_row(arm, "after", metric)
        if higher is None or before is None or after is None or before.shape != after.shape:
            continue
        test = paired_difference(after, before) if higher else paired_difference(before, after)
        gains[name] = {"mean": test.mean, "low": test.low, "high": test.high}
    return gains


def _front(table: Mapping[str, Mapping[str, Any]], goals: Sequence[str], arms: Iterable[str]) -> list[str]:
    """The arms that no other arm dominates in all goals."""
    points: dict[str, list[float]] = {}
    for name in arms:
        points[name] = []
        for goal in goals:
            mean = table[goal][name]["mean"]
            points[name].append(-mean if metric_of(goal).higher_is_better else mean)
    return pareto_front(points)


# ---------------------------------------------------------------------------------------------- reading runs


def read_report(run: Path) -> Report:
    """A run's report.json; of a plan: before its first run, after its last, and what all of them cost."""
    report = read_json(run / "report.json")
    steps = [read_report(step) for step in plan_runs(report)]
    if not steps:
        return report
    seconds, tokens, peak = 0.0, 0.0, 0.0
    for step in steps:
        stats = step["stats"]
        seconds += stats.get("seconds", 0.0)
        tokens += stats.get("tokens_per_second", 0.0) * stats.get("seconds", 0.0)
        peak = max(peak, stats.get("peak_memory_mb", 0.0))
    cost = {
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "peak_memory_mb": peak,
    }
    return {**report, "before": steps[0]["before"], "stats": {**report["stats"], **cost}}


def _final_folder(run: Path) -> Path:
    """Where a run's files lie; of a plan, the folder of the run that stands for it."""
    path = run / "report.json"
    if not path.is_file():
        return run
    report = read_json(path)
    if plan_runs(report):
        return Path(report["folder"])
    return run


def _values(arm: ArmResult, metric: str) -> np.ndarray | None:
    """[seeds, rows] of a metric; [seeds, 1] where it is no mean over rows; None where a run lacks it."""
    per_row = _per_row(arm, "after", metric)
    if per_row is not None:
        return per_row
    values = []
    for run in arm.folders():
        report = read_report(run)
        measured = {**report["stats"], "trained": report["stats"].get("moving"), **report["after"]}
        value = measured.get(metric)
        if not isinstance(value, (int, float)):
            return None
        values.append(value)
    return np.array(values, float)[:, None]


def _per_row(arm: ArmResult, when: str, metric: str) -> np.ndarray | None:
    """[seeds, rows] of a metric before, during or after training; None unless every run has the same rows."""
    rows: list[str] = []
    matrix = []
    for run in arm.folders():
        path = per_example_file(_final_folder(run), when)
        values = read_json(path).get(metric) if path.is_file() else None
        if values is None and when == "during":  # finished before it could be paused
            return _per_row(arm, "after", metric)
        if not values:
            return None
        rows = rows or sorted(values)
        if sorted(values) != rows:
            return None
        matrix.append([values[row] for row in rows])
    if not matrix:
        return None
    return np.array(matrix)


# ---------------------------------------------------------------------------------------------- statistics


def _cell(values: np.ndarray) -> dict[str, Any]:
    """One metric of one arm; values [seeds, rows]."""
    mean = float(values.mean())
    low, high = mean, mean
    if values.size > 1:
        low, high = bootstrap_interval(values)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "by_seed": values.mean(1).tolist(),
        "rows": values.shape[1],
    }


def _pairs(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of arms; p values are corrected by Holm over all pairs of this metric."""
    tests = []
    for a, b in combinations(values, 2):
        if values[a].shape == values[b].shape:
            tests.append((a, b, paired_difference(values[a], values[b])))
    pairs = []
    for (a, b, test), p in zip(tests, holm([test.p for _, _, test in tests])):
        pairs.append(
            {
                "a": a,
                "b": b,
                "difference": test.mean,
                "low": test.low,
                "high": test.high,
                "p": p,
                "apart": bool(p < ALPHA and test.excludes_zero),
            }
        )
    return pairs


def arms_behind(spec: ComparisonSpec, results: Mapping[str, ArmResult], share: float) -> dict[str, str]:
    """Arms to stop after a share of their steps, and why: those outside the better half that are behind the
    best by more than chance explains.
    """
    active = {}
    for name, arm in results.items():
        values = _per_row(arm, "during", spec.metric)
        if values is not None and not arm.stopped:
            active[name] = values
    if len(active) < 3:
        return {}
    sign = -1 if metric_of(spec.metric).higher_is_better else 1
    best, *others = sorted(active, key=lambda name: sign * float(active[name].mean()))
    tests = [paired_difference(sign * active[name], sign * active[best]) for name in others]
    worse_half = others[-(len(active) // 2) :]
    reasons = {}
    for name, test, p in zip(others, tests, holm([test.p for test in tests])):
        if name in worse_half and p < ALPHA and test.low > 0:
            reasons[name] = (
                f"after {share:.0%} of the steps its {spec.metric} is"
                f" {format_number(float(active[name].mean()))}, that of {best}"
                f" {format_number(float(active[best].mean()))} (difference"
                f" {format_number(test.low)} to {format_number(test.high)})"
            )
    return reasons


def sentence(
    metric: str,
    cells: Mapping[str, Mapping],
    pairs: Sequence[Mapping],
    stopped: Mapping[str, str],
    before: float | None = None,
    gains: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> str:
    """The answer: which arm is best and by how much, from which no difference was seen, and how far the arms
    came from the untuned model. Differences are claimed as far as their intervals go; an arm learned next to
    nothing by its mean alone.

    before: the metric of the untuned model. gains: of arms over it, as `_gains` gives them.
    """
    if not cells:
        return "No arm finished."
    declared = metric_of(metric)
    better = max if declared.higher_is_better else min
    best = better(cells, key=lambda name: cells[name]["mean"])
    apart, level = [], []
    for pair in pairs:
        if best in (pair["a"], pair["b"]):
            other = pair["b"] if pair["a"] == best else pair["a"]
            (apart if pair["apart"] else level).append(f"{other}{_by_how_much(metric, pair)}")
    tested = {pair[side] for pair in pairs for side in ("a", "b")}
    level += [name for name in cells if name != best and name not in tested]
    text = f"{declared.label}: {best} {format_metric(metric, cells[best]['mean'])}"
    if before is not None:
        text += f" (untuned {format_metric(metric, before)})"
    if apart:
        text += f", better than {join_names(apart)}"
    if level:
        text += f"; no significant difference from {join_names(level)}"
    if level and not apart:
        text += ", so there is no winner"
    idle = _arms_that_learned_nothing(metric, before, gains)
    if idle:
        names = join_names(idle)
        if len(idle) == len(cells):
            names = "both" if len(idle) == 2 else "all arms"
        text += f"; {names} learned next to nothing"
    if stopped:
        text += f"; left out: {join_names(list(stopped))}"
    return text[0].upper() + text[1:] + "."


def _by_how_much(metric: str, pair: Mapping[str, Any]) -> str:
    """' by 0.12 (0.05 to 0.19)' of a paired difference; where it is none, an interval with its signs."""
    if "low" not in pair:
        return ""
    low, high = pair["low"], pair["high"]
    if pair["apart"]:
        size = format_difference(metric, abs(pair["difference"]), unit=True)[1:]
        ends = sorted((abs(low), abs(high)))
        return f" by {size} ({' to '.join(format_difference(metric, end)[1:] for end in ends)})"
    ends = [format_difference(metric, end) for end in (low, high)]
    return f" ({' to '.join(ends)})"


def _arms_that_learned_nothing(
    metric: str, before: float | None, gains: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The arms whose gain over the untuned model is less than LEAST_GAIN of its value, or of 1 for shares."""
    if before is None:
        return []
    least = LEAST_GAIN * (1.0 if metric_of(metric).is_share else abs(before))
    return [name for name, gain in gains.items() if gain["mean"] < least]
