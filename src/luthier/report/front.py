"""report.html of a Pareto front: its hypervolume, a map of it, every model with its weights and its run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luthier.methods.evaluators._base import per_example_file
from luthier.report.chart import Figure, scatter_figure
from luthier.report.comparison import axis, cell_of, colour, point_line, run_page
from luthier.report.html import render
from luthier.report.numbers import metric_of
from luthier.storage import files

UNTUNED = "untuned"


def page(report: Any) -> str:
    """report: of a plan `front`, with stats["front"]."""
    front = report.stats["front"]
    goals, metrics, runs = list(front["metrics"]), list(front["metrics"].values()), front["folders"]
    folder = Path(runs[0]).parent
    untuned = [_cell(value) for value in front["before"]]
    models: list[dict[str, Any]] = [
        {"name": UNTUNED, "cells": untuned, "weights": [""] * len(goals), "link": None, "front": False}
    ]
    for i, run in enumerate(runs):
        models.append(
            {
                "name": f"model {i}",
                "cells": _cells(Path(run), metrics, front["reached"][i]),
                "weights": [f"{weight:.3g}" for weight in front["preferences"][i]],
                "link": run_page(run, folder),
                "front": i in front["kept"],
            }
        )
    for model in models:
        model["texts"] = [cell_of(metric, cell) for metric, cell in zip(metrics, model["cells"], strict=True)]
    reference = ", ".join(f"{goal} {worst:.3g}" for goal, worst in zip(goals, front["worst"], strict=True))
    between = f"{', '.join(goals[:-1])} and {goals[-1]}"
    return render(
        "front.html.j2",
        title="Pareto front",
        headline=f"{len(runs)} models between {between}: hypervolume {front['hypervolume']:.3g}.",
        colours={model["name"]: colour(i) for i, model in enumerate(models)},
        figures=[_figure(metrics, models, k) for k in range(1, len(metrics))],
        head=[*(f"weight of {goal}" for goal in goals), *(metric_of(metric).label for metric in metrics)],
        models=models,
        reference=reference,
        best=os.path.relpath(report.folder, folder),
    )


def _cell(value: float) -> dict[str, float]:
    return {"mean": value, "low": value, "high": value}


def _cells(run: Path, metrics: Sequence[str], values: Sequence[float]) -> list[dict[str, float]]:
    """{mean, low, high} of each metric; the interval over rows, where values by row were saved."""
    from scipy.stats import bootstrap

    path = per_example_file(run, "after")
    by_row = files.read_object(path) if path.is_file() else {}
    cells = []
    for metric, value in zip(metrics, values, strict=True):
        each = list(by_row.get(metric, {}).values())
        cell = _cell(value)
        if len(each) > 1:
            resampled = bootstrap((each,), np.mean, n_resamples=2000, method="percentile", rng=0)
            cell["low"], cell["high"] = map(float, resampled.confidence_interval)
        cells.append(cell)
    return cells


def _figure(metrics: Sequence[str], models: Sequence[Mapping[str, Any]], k: int) -> Figure:
    """The first goal (up) by the k-th (across); of two goals, with the steps that the front dominates."""
    points = []
    for i, model in enumerate(models):
        up, across = model["cells"][0], model["cells"][k]
        lines = [model["name"], point_line(metrics[0], up["mean"]), point_line(metrics[k], across["mean"])]
        points.append(
            {
                "text": "\n".join(lines),
                "colour": colour(i),
                "hollow": not model["front"],
                "x": across["mean"],
                "y": up["mean"],
                "low": up["low"],
                "high": up["high"],
                "link": model["link"],
            }
        )
    path = []
    if len(metrics) == 2:  # of more goals, one that is left out may be what puts a model on the front
        corners = sorted((point["x"], point["y"]) for point in points if not point["hollow"])
        path = corners[:1]
        for (_, y), (x, lower) in pairwise(corners):
            path += [(x, y), (x, lower)]
    return scatter_figure(axis(metrics[k]), axis(metrics[0]), points, path)
