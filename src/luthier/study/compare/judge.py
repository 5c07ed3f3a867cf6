"""From the runs' reports to the result: every metric with its interval, every pair of arms with its
difference, the Pareto front, and a sentence that claims no more than the intervals support.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import per_example_file
from luthier.recipe.recipe import Recipe
from luthier.registry import COSTS, did_you_mean
from luthier.registry import metric as metric_of
from luthier.report.numbers import format_number
from luthier.run.report import plan_runs
from luthier.study.compare.spec import ALPHA, FRONT_METRICS, ComparisonSpec, join_names
from luthier.study.statistics import bootstrap_interval, holm, paired_difference, pareto_front

Report = dict[str, Any]


@dataclass
class ArmResult:
    """What is known of an arm so far."""

    recipe: Recipe
    runs: dict[int, Path] = field(default_factory=dict)  # seed -> folder
    stopped: str = ""  # why it was stopped early, if so

    def folders(self) -> list[Path]:
        """Of its runs, in the order of their seeds."""
        return [self.runs[seed] for seed in sorted(self.runs)]


def judge(spec: ComparisonSpec, results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """The result of a comparison as plain data (comparison.json). Raises RecipeError where no arm measured
    the spec's metric.
    """
    finished = {name: arm for name, arm in results.items() if not arm.stopped}
    stopped = {name: arm.stopped for name, arm in results.items() if arm.stopped}
    reports = {name: [read_report(run) for run in arm.folders()] for name, arm in finished.items()}
    every_report = [report for of_arm in reports.values() for report in of_arm]
    metrics = _common_metrics(every_report)
    table: dict[str, dict[str, Any]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    for metric in [*metrics, *COSTS]:
        values = {name: _values(arm, reports[name], metric) for name, arm in finished.items()}
        measured = {name: matrix for name, matrix in values.items() if matrix is not None}
        if len(measured) < len(finished):
            continue
        table[metric] = {name: _cell(matrix) for name, matrix in measured.items()}
        if metric not in COSTS and "/" not in metric:
            pairs[metric] = _pairs(measured)
    if finished and spec.metric not in table:
        raise no_metric(spec.metric, table)
    goals = [goal for goal in dict.fromkeys((spec.metric, *FRONT_METRICS)) if goal in table]
    before = {metric: _mean_before(every_report, metric) for metric in metrics}
    first = next(iter(results.values())).recipe
    return {
        "sentence": sentence(spec.metric, table.get(spec.metric, {}), pairs.get(spec.metric, []), stopped),
        "metric": spec.metric,
        "table": table,
        "pairs": pairs,
        "front": pareto_front({name: _point(table, goals, name) for name in finished}),
        "goals": goals,
        "stopped": stopped,
        "before": {metric: mean for metric, mean in before.items() if mean is not None},
        "arms": {name: _describe(arm) for name, arm in results.items()},
        "seeds": spec.seeds,
        "budget": spec.budget,
        "rows": every_report[0]["stats"].get("held_out_rows") if every_report else None,
        "model": first.model,
        "data": first.data if isinstance(first.data, (str, dict)) else "rows given in Python",
    }


def no_metric(name: str, measured: Mapping[str, Any]) -> RecipeError:
    return RecipeError(f"--metric: the arms measured no '{name}'{did_you_mean(name, measured)}")


def _describe(arm: ArmResult) -> dict[str, Any]:
    return {
        "recipe": arm.recipe.yaml(),
        "runs": [str(run) for run in arm.folders()],
        "learning_rate": arm.recipe.learning_rate,
    }


def _common_metrics(reports: Sequence[Report]) -> list[str]:
    """Metrics that every run measured at its end, in the order of their first appearance."""
    names = dict.fromkeys(name for report in reports for name in report["after"])
    return [name for name in names if all(name in report["after"] for report in reports)]


def _mean_before(reports: Sequence[Report], metric: str) -> float | None:
    values = [report["before"][metric] for report in reports if metric in report["before"]]
    if not values:
        return None
    return float(np.mean(values))


def _point(table: Mapping[str, Mapping[str, Any]], goals: Sequence[str], name: str) -> list[float]:
    """An arm's place before the front, every goal the better the smaller."""
    point = []
    for goal in goals:
        mean = table[goal][name]["mean"]
        point.append(-mean if metric_of(goal).higher_is_better else mean)
    return point


# ---------------------------------------------------------------------------------------------- reading runs


def read_report(run: Path) -> Report:
    """A run's report.json; of a plan: before its first run, after its last, and what all of them cost."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    steps = [read_report(run) for run in plan_runs(report)]
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
    report = json.loads(path.read_text(encoding="utf-8"))
    if plan_runs(report):
        return Path(report["folder"])
    return run


def _values(arm: ArmResult, reports: Sequence[Report], metric: str) -> np.ndarray | None:
    """[seeds, rows] of a metric; [seeds, 1] where it is no mean over rows; None where a run lacks it."""
    per_row = _per_row(arm, "after", metric)
    if per_row is not None:
        return per_row
    values = []
    for report in reports:
        measured = {**report["stats"], "trained": report["stats"].get("moving"), **report["after"]}
        value = measured.get(metric)
        if not isinstance(value, (int, float)):
            return None
        values.append(value)
    return np.array(values, float)[:, None]


def _per_row(arm: ArmResult, when: str, metric: str) -> np.ndarray | None:
    """[seeds, rows] of a metric before, during or after training; None unless every run has the same rows."""
    of_seeds = []
    for run in arm.folders():
        path = per_example_file(_final_folder(run), when)
        values = None
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8")).get(metric)
        if values is None and when == "during":  # finished before it could be paused
            return _per_row(arm, "after", metric)
        if not values:
            return None
        of_seeds.append(values)
    if not of_seeds or any(values.keys() != of_seeds[0].keys() for values in of_seeds):
        return None
    rows = sorted(of_seeds[0])
    return np.array([[values[row] for row in rows] for values in of_seeds])


# ---------------------------------------------------------------------------------------------- statistics


def _cell(values: np.ndarray) -> dict[str, Any]:
    """One metric of one arm; values [seeds, rows]."""
    mean = float(values.mean())
    low, high = bootstrap_interval(values) if values.size > 1 else (mean, mean)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "by_seed": [float(x) for x in values.mean(1)],
        "rows": values.shape[1],
    }


def _pairs(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of arms; p values are corrected by Holm over all pairs of this metric."""
    tests = []
    for a, b in combinations(values, 2):
        if values[a].shape == values[b].shape:
            tests.append((a, b, paired_difference(values[a], values[b])))
    corrected = holm([test.p for _, _, test in tests])
    pairs = []
    for (a, b, test), p in zip(tests, corrected):
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
        values = None if arm.stopped else _per_row(arm, "during", spec.metric)
        if values is not None:
            active[name] = values
    if len(active) < 3:
        return {}
    sign = -1 if metric_of(spec.metric).higher_is_better else 1
    best, *others = sorted(active, key=lambda name: sign * float(active[name].mean()))
    tests = [paired_difference(sign * active[name], sign * active[best]) for name in others]
    corrected = holm([test.p for test in tests])
    worse_half = others[-(len(active) // 2) :]
    reasons = {}
    for name, test, p in zip(others, tests, corrected):
        if name in worse_half and p < ALPHA and test.low > 0:
            reasons[name] = (
                f"after {share:.0%} of its steps its {spec.metric} is"
                f" {format_number(float(active[name].mean()))}, that of {best}"
                f" {format_number(float(active[best].mean()))} (they differ by {format_number(test.low)} to"
                f" {format_number(test.high)})"
            )
    return reasons


def sentence(
    metric: str, cells: Mapping[str, Mapping], pairs: Sequence[Mapping], stopped: Mapping[str, str]
) -> str:
    """The answer: which arm is best, and from which no difference was seen. Claims no more than the intervals
    support.
    """
    if not cells:
        return "No arm finished."
    how = metric_of(metric)
    best = (max if how.higher_is_better else min)(cells, key=lambda name: cells[name]["mean"])
    behind = []
    for pair in pairs:
        if pair["apart"] and best in (pair["a"], pair["b"]):
            behind.append(pair["b"] if pair["a"] == best else pair["a"])
    level = [name for name in cells if name != best and name not in behind]
    text = f"{how.label}: {best} {format_number(cells[best]['mean'], how.is_share)}"
    if behind:
        text += f", better than {join_names(behind)}"
    if level:
        text += f"; no difference seen between it and {join_names(level)}"
    if level and not behind:
        text += ", so no winner"
    if stopped:
        text += f"; stopped early: {join_names(list(stopped))}"
    return text[0].upper() + text[1:] + "."
