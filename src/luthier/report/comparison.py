"""report.html of a comparison: the answer first, then metrics with their intervals, trade-offs, curves,
recipes.
"""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.report.chart import COLOURS, Curve, Figure, curves_figure, curves_table, scatter_figure
from luthier.report.html import render
from luthier.report.numbers import (
    format_difference,
    format_metric,
    generations,
    metric_of,
)
from luthier.report.page import series
from luthier.storage import files
from luthier.storage.layout import read_log

PAIRED = ("accuracy", "retention_accuracy", "retention_loss")
GENERATIONS = 8  # prompts shown


def page(result: Mapping[str, Any]) -> str:
    """result: what `luthier.compare` gives (comparison.json)."""
    rows = "training rows"
    if result.get("rows"):
        rows = f"{result['rows']:,} held-out rows"
    tiles = [
        ("model", result["model"]),
        ("measured on", rows),
        ("seeds", result["seeds"]),
        ("budget of a run", result["budget"] or "as in the recipes"),
    ]
    return render(
        "comparison.html.j2",
        title=" / ".join(result["arms"]),
        headline=result["sentence"],
        tiles=tiles,
        date=result["date"],
        recipes=_recipes(result),
        **sections(result),
    )


def sections(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a page about arms shows of them; a search shows it of its candidates."""
    return {
        "arms": finished_arms(result),
        "front": result["front"],
        "goals": result["goals"],
        "metrics": metric_table(result),
        "pairs": _pairs(result),
        "parts": _parts(result),
        "tradeoffs": tradeoffs(result),
        "colours": dict(zip(result["arms"], map(colour, range(len(result["arms"]))))),
        "training": _training(result),
        "calibration": _calibration(result),
        "generations": _generations(result),
        "notes": result["notes"],
        "stopped": result["stopped"],
    }


def finished_arms(result: Mapping[str, Any]) -> list[str]:
    """Names of the arms that were not stopped early."""
    return [name for name in result["arms"] if name not in result["stopped"]]


def colour(i: int) -> str:
    """The colour of the i-th arm: a custom property of static/theme.css."""
    return f"c{i % COLOURS}"


# ---------------------------------------------------------------------------------------------- metrics


def metric_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics by arm. The best mean is bold only where a difference from some other arm is significant."""
    arms = finished_arms(result)
    rows = []
    for metric, cells in result["table"].items():
        if "/" in metric or not arms:
            continue
        best = _winners(result, metric)
        row = {"metric": metric, "before": format_metric(metric, result["before"].get(metric)), "cells": []}
        for arm in arms:
            row["cells"].append(cell_of(metric, cells[arm], arm in best))
        rows.append(row)
    return rows


def cell_of(metric: str, cell: Mapping[str, Any], best: bool = False) -> dict[str, Any]:
    """{mean, low, high, best} for the macro `value` of the templates; an interval without width is none."""
    texts: dict[str, Any] = {"mean": format_metric(metric, cell["mean"]), "low": "", "high": "", "best": best}
    if cell["low"] < cell["high"]:
        texts |= {"low": format_metric(metric, cell["low"]), "high": format_metric(metric, cell["high"])}
    return texts


def _winners(result: Mapping[str, Any], metric: str) -> list[str]:
    """The best arm and those that do not differ from it significantly, where it differs from some arm."""
    higher = metric_of(metric).higher_is_better
    if higher is None:
        return []
    means = {name: cell["mean"] for name, cell in result["table"][metric].items()}
    ranked = sorted(means, key=means.__getitem__, reverse=higher)
    best, behind = ranked[0], set()
    for pair in result["pairs"].get(metric, ()):
        arms = {pair["a"], pair["b"]}
        if pair["apart"] and best in arms:
            behind |= arms - {best}
    return [name for name in ranked if behind and name not in behind]


def _pairs(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Paired differences, by the label of their metric."""
    tables = {}
    for metric in dict.fromkeys((result["metric"], *PAIRED)):
        rows = []
        for pair in result["pairs"].get(metric, ()):
            rows.append(
                {
                    "arms": f"{pair['a']} − {pair['b']}",
                    "difference": format_difference(metric, pair["difference"]),
                    "low": format_difference(metric, pair["low"]),
                    "high": format_difference(metric, pair["high"]),
                    "p": pair["p"],
                    "significant": pair["apart"],
                }
            )
        if rows:
            tables[metric_of(metric).label] = rows
    return tables


def paired_differences(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every paired difference with its interval, by metric, the one that arms are compared by first: {label,
    better, pairs: [{a, b, mean, low, high, text, p, significant}]}, for a picture of them. better: which way
    a metric is, 'higher', 'lower' or empty.
    """
    families = []
    for metric in dict.fromkeys((result["metric"], *result["pairs"])):
        pairs = []
        for pair in result["pairs"].get(metric, ()):
            numbers = (pair["difference"], pair["low"], pair["high"])
            mean, low, high = (format_difference(metric, number) for number in numbers)
            one = {"a": pair["a"], "b": pair["b"], "p": pair["p"], "significant": pair["apart"]}
            one |= {"mean": pair["difference"], "low": pair["low"], "high": pair["high"]}
            pairs.append({**one, "text": f"{mean} ({low} to {high})"})
        described = metric_of(metric)
        if pairs:
            label = described.label + " (points)" * described.is_share
            families.append({"label": label, "better": described.better or "", "pairs": pairs})
    return families


def _parts(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Parts of metrics ('retention_accuracy/chat') by arm: {label of the metric: rows}."""
    arms = finished_arms(result)
    tables = defaultdict(list)
    for metric, cells in result["table"].items():
        family, _, part = metric.partition("/")
        if part:
            means = [result["before"].get(metric), *(cells[arm]["mean"] for arm in arms)]
            row = [part, *(format_metric(family, mean) for mean in means)]
            tables[metric_of(family).label].append(row)
    return dict(tables)


# ---------------------------------------------------------------------------------------------- pictures


def tradeoffs(result: Mapping[str, Any]) -> list[Figure]:
    """A map of the metric against each other goal: an arm is a point, its interval a line."""
    metric, table = result["metric"], result["table"]
    figures = []
    for goal in result["goals"]:
        if goal == metric:
            continue
        points = []
        for i, name in enumerate(result["arms"]):
            if name not in table[metric]:
                continue
            across, up = table[goal][name]["mean"], table[metric][name]
            lines = [name, point_line(metric, up["mean"]), point_line(goal, across)]
            points.append(
                {
                    "text": "\n".join(lines),
                    "colour": colour(i),
                    "x": across,
                    "y": up["mean"],
                    "low": up["low"],
                    "high": up["high"],
                    "link": run_page(result["arms"][name]["runs"][0], result["folder"]),
                }
            )
        figures.append(scatter_figure(axis(goal), axis(metric), points))
    return figures


def axis(metric: str) -> dict[str, Any]:
    """An axis of a map."""
    described = metric_of(metric)
    return {"label": described.label, "percent": described.is_share}


def point_line(metric: str, value: float) -> str:
    """'loss 0.33'."""
    return f"{metric_of(metric).label} {format_metric(metric, value)}"


def run_page(run: str, folder: str | Path) -> str:
    """A run's page, as seen from a page in `folder`."""
    return os.path.relpath(Path(run) / "report.html", folder)


def _training(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Loss by step, the mean over seeds."""
    curves = []
    for i, (name, arm) in enumerate(result["arms"].items()):
        by_step = defaultdict(list)
        for run in arm["runs"]:
            for step, value in series(read_log(Path(run)), "loss"):
                by_step[step].append(value)
        means = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
        curves.append(Curve(name, colour(i), means))
    figure = curves_figure("training loss by step", curves, log=True)
    if figure is None:
        return None
    return {"figure": figure, "table": curves_table(curves)}


def _calibration(result: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for i, (name, arm) in enumerate(result["arms"].items()):
        if arm["runs"]:
            path = Path(arm["runs"][0]) / "calibration-after.json"
            figures += calibration_figure(path, name, colour(i))
    return figures


def calibration_figure(path: Path, caption: str, colour: str = "wood") -> list[Figure]:
    """A reliability diagram from the file of the evaluator `calibration`, none where there is no file."""
    if not path.is_file():
        return []
    bins = files.read_json(path)
    points = [(100 * confidence, 100 * accuracy) for _, confidence, accuracy in bins]
    curves = [Curve("perfect", "raw", [(0, 0), (100, 100)], width=1), Curve("accuracy %", colour, points)]
    figure = curves_figure(caption, curves, x="confidence %", height=170, zero=True)
    return [figure] if figure else []


# --------------------------------------------------------------------------------------- generations, recipes


def _generations(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first prompts with what each arm generated, first seed."""
    by_arm = {}
    for name, arm in result["arms"].items():
        if arm["runs"] and (rows := generations(arm["runs"][0])):
            by_arm[name] = {row["id"] or row["prompt"]: row for row in rows}
    if not by_arm:
        return []
    first = list(next(iter(by_arm.values())).values())
    articles = []
    for prompt in first[:GENERATIONS]:
        texts = []
        for name, rows in by_arm.items():
            row = rows.get(prompt["id"] or prompt["prompt"], {})
            texts.append({"arm": name, "text": row.get("after"), "score": row.get("score_after")})
        articles.append({"prompt": prompt["prompt"], "reference": prompt["expected"], "texts": texts})
    return articles


def _recipes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each arm: its runs and how to repeat the first."""
    recipes = []
    for name, arm in result["arms"].items():
        links = [run_page(run, result["folder"]) for run in arm["runs"]]
        command = ""
        if arm["runs"]:
            path = shlex.quote(str(Path(arm["runs"][0]) / "recipe.yaml"))
            command = f"luthier tune {path} output_dir=again"
        recipes.append({"name": name, "links": links, "command": command, "text": arm["recipe"]})
    return recipes
