"""Figures of a page as data; static/charts.js draws them with uPlot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

from luthier.report.numbers import format_number

Points = Sequence[tuple[float, float]]  # (step, value), finite
COLOURS = 8  # c0 to c7 of theme.css can be told apart
DIGITS = 6  # significant digits of a point in a page


@dataclass(frozen=True)
class Curve:
    """One curve of a figure. colour: a custom property of static/theme.css."""

    name: str
    colour: str
    points: Points
    dash: bool = False
    width: float = 2


@dataclass(frozen=True)
class Figure:
    """What the macro `figure` of the templates shows. spec: see static/charts.js."""

    kind: str  # curves or scatter
    caption: str
    spec: Mapping[str, Any]


def curves_figure(
    caption: str,
    curves: Sequence[Curve],
    *,
    x: str = "step",
    height: int = 240,
    zero: bool = False,
    log: bool = False,
) -> Figure | None:
    """A figure of the curves that have points; None where none has.

    zero: the y axis begins at 0. log: offer a logarithmic one, where all values are positive. height: pixels.
    """
    series = []
    for curve in curves:
        points = []
        for step, value in thinned(curve.points):
            points.append((float(f"{step:.{DIGITS}g}"), float(f"{value:.{DIGITS}g}")))
            log = log and value > 0
        if points:
            series.append({**vars(curve), "points": points})
    if not series:
        return None
    spec = {"label": caption, "x": x, "height": height, "zero": zero, "log": log, "series": series}
    return Figure("curves", caption, spec)


def scatter_figure(
    x: Mapping[str, Any], y: Mapping[str, Any], points: Sequence[Mapping[str, Any]], path: Points = ()
) -> Figure:
    """A map of points. x, y: {label, percent}; points: {text, colour, x, y, low, high, link, shape,
    hollow}.
    """
    caption = f"{y['label']} by {x['label']}"
    return Figure("scatter", caption, {"x": x, "y": y, "points": points, "path": path})


def curves_table(curves: Sequence[Curve], x: str = "step", most: int = 12) -> dict[str, Any]:
    """Curves in numbers, for readers without a script: {head, rows}, at most about `most` rows.

    A curve with few points keeps them all: of held-out losses each counts.
    """
    columns: dict[str, dict[float, float]] = {}
    steps: set[float] = set()
    chosen: set[float] = set()
    for curve in curves:
        values = dict(curve.points)
        steps.update(values)
        if values:
            columns[curve.name] = values
        if len(values) <= most:
            chosen.update(values)
    ordered = sorted(steps)
    chosen.update(ordered[:: max(1, len(ordered) // most)], ordered[-1:])
    rows = []
    for step in sorted(chosen):
        row = [f"{step:,.0f}"]
        for values in columns.values():
            row.append(format_number(values.get(step)))
        rows.append(row)
    return {"head": [x, *columns], "rows": rows}


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of what lies around each point, about a twentieth of the run: symmetric, so that no lag is
    drawn.
    """
    half = len(points) // 40 or min(1, len(points) // 8)
    sums = list(accumulate(map(itemgetter(1), points), initial=0.0))
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def thinned(points: Points, most: int = 800) -> list[tuple[float, float]]:
    """At most so many points: of each stretch its lowest and highest, so that no spike disappears."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    out = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        out += sorted({min(stretch, key=itemgetter(1)), max(stretch, key=itemgetter(1))})
    return out
