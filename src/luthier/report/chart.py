"""Curves as inline SVG that stretches to any width, with its labels in HTML so that they stay readable on a
phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate

from luthier.report.numbers import number

Points = Sequence[tuple[float, float]]  # (step, value), finite
SIDE = 1000  # of the square that is stretched


def chart(
    series: Sequence[tuple[str, str, Points]], *, log: bool = False, low: float | None = None, label: str = ""
) -> str:
    """A figure of named curves: (name, css class, points). log: a logarithmic y axis, for positive values
    only.
    """
    series = [(n, c, [(x, y) for x, y in p if y > 0 or not log]) for n, c, p in series]
    every = [point for _, _, points in series for point in points]
    if not every:
        return ""
    xs, ys = [x for x, _ in every], [y for _, y in every]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    marks = (log_ticks if log else ticks)(min(ys) if low is None else min(low, *ys), max(ys))
    bottom, top = min(marks[0], min(ys)), max(marks[-1], max(ys))
    bend = math.log if log else float

    def across(x: float) -> float:
        return (x - left) / (right - left) * SIDE

    def down(y: float) -> float:
        return SIDE - (bend(y) - bend(bottom)) / ((bend(top) - bend(bottom)) or 1) * SIDE

    grid = "".join(
        f'<line class="grid" x1="0" x2="{SIDE}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>' for y in marks
    )
    drawn = "".join(curve([(across(x), down(y)) for x, y in p], c) for _, c, p in series if p)
    hover = columns(series, across)
    beside = "".join(f'<span class="y" style="top:{down(y) / SIDE:.2%}">{short(y)}</span>' for y in marks)
    # there is no half a step, nor half a layer
    counted = [x for x in ticks(left, right, 5) if left <= x <= right and x == round(x)]
    below = "".join(f'<span class="x" style="left:{across(x) / SIDE:.2%}">{x:,.0f}</span>' for x in counted)
    return (
        f'<div class="chart" role="img" aria-label="{escape(label)}"><svg viewBox="0 0 {SIDE} {SIDE}"'
        f' preserveAspectRatio="none">{grid}{drawn}{hover}</svg>{beside}{below}</div>'
    )


def curve(points: Points, name: str) -> str:
    """One line; a lone point becomes a dash across."""
    if len(points) == 1:
        points = [(0, points[0][1]), (SIDE, points[0][1])]
    said = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{escape(name)}" points="{said}"/>'


def columns(series: Sequence[tuple[str, str, Points]], across, most: int = 120) -> str:
    """Invisible columns whose tooltip says the values of a step."""
    steps = sorted({x for _, _, points in series for x, _ in points})
    steps = steps[:: max(1, -(-len(steps) // most))]
    known = [(name, dict(points)) for name, _, points in series]
    out, width = [], SIDE / max(1, len(steps))
    for x in steps:
        said = ", ".join(f"{name} {number(values[x])}" for name, values in known if x in values)
        box = f'x="{across(x) - width / 2:.1f}" y="0" width="{width:.1f}" height="{SIDE}"'
        out.append(f"<rect {box}><title>step {x:,.0f}: {escape(said)}</title></rect>")
    return "".join(out)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around positive values; powers of ten alone where there would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    inside = [v for v in every if low / 2.5 <= v <= high * 2.5]
    some = [v for v in inside if math.log10(v) % 1 == 0] if len(inside) > 7 else inside
    return some if len(some) > 1 else [low, max(high, low * 1.01)]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of what lies around each point, about a twentieth of the run: even-handed, so that no lag is
    drawn.
    """
    half = len(points) // 40 or min(1, len(points) // 8)
    sums = list(accumulate((y for _, y in points), initial=0.0))
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def short(y: float) -> str:
    """A round number beside an axis: 0, 0.25, 1,000, 1.5e-4."""
    if y and abs(y) < 1e-3:
        digits, power = f"{y:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:g}"


def thinned(points: Points, most: int = 800) -> list[tuple[float, float]]:
    """At most so many points: of each stretch its lowest and highest, so that no spike disappears."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    out = []
    for i in range(0, len(points), size):
        some = points[i : i + size]
        out += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
    return out
