"""report.html of a front: how much of the space of goals it reaches, a map of it, every model with its
weights and its run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from luthier.methods.evaluators._base import per_example_file
from luthier.report.chart import SIDE
from luthier.report.comparison import OWN, key, label, place, plane, shown, spot
from luthier.report.page import STYLE, document, section, versions

BEFORE = "untuned"


def page(report: Any) -> str:
    """report: of a plan `front`, with stats["front"]."""
    found = report.stats["front"]
    metrics = list(found["metrics"].values())
    folder = Path(found["folders"][0]).parent
    names = [f"model {i}" for i in range(len(found["folders"]))]
    cells = {
        name: _cells(Path(run), metrics, values)
        for name, run, values in zip(names, found["folders"], found["reached"], strict=True)
    }
    cells = {BEFORE: [(v, v, v) for v in found["before"]], **cells}
    links = dict(
        zip(
            names,
            (os.path.relpath(Path(run) / "report.html", folder) for run in found["folders"]),
            strict=True,
        )
    )
    kept = [names[i] for i in found["kept"]]
    goals = list(found["metrics"])
    said = (
        f"{len(names)} models between {', '.join(goals[:-1])} and {goals[-1]}: hypervolume"
        f" {found['hypervolume']:.3g}."
    )
    parts = (
        f'<header><p class="what">front</p><h1>{escape(said)}</h1></header>',
        _maps(metrics, cells, links, kept),
        _table(found, names, cells, links, kept),
        _again(report, folder),
    )
    return document("front", "".join(parts), STYLE + OWN + STAIRS)


def _cells(run: Path, metrics: Sequence[str], values: Sequence[float]) -> list[tuple[float, float, float]]:
    """(mean, low, high) of each metric; the interval over rows, where they were kept."""
    path = per_example_file(run, "after")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    out = []
    for metric, value in zip(metrics, values, strict=True):
        each = list(rows.get(metric, {}).values())
        low, high = value, value
        if len(each) > 1:
            drawn = bootstrap((each,), np.mean, n_resamples=2000, method="percentile", rng=0)
            low, high = map(float, drawn.confidence_interval)
        out.append((value, low, high))
    return out


def _maps(
    metrics: Sequence[str], cells: Mapping[str, list], links: Mapping[str, str], kept: Sequence[str]
) -> str:
    """The first goal (up) by each other (across); the steps are what the front reaches."""
    figures = ""
    for k in range(1, len(metrics)):
        xs, ys = [c[k][0] for c in cells.values()], [v for c in cells.values() for v in c[0]]
        drawn = ""
        if len(metrics) == 2:  # of more goals, one that is left out may be what keeps a model on the front
            corners = sorted((cells[n][k][0], cells[n][0][0]) for n in kept)
            steps = (
                [corners[0], *(p for (_, y), (x, b) in pairwise(corners) for p in ((x, y), (x, b)))]
                if corners
                else []
            )
            across, up = place(xs), place(ys, 4)
            drawn = (
                '<polyline class="stairs"'
                f' points="{" ".join(f"{across(x):.0f},{SIDE - up(y):.0f}" for x, y in steps)}"/>'
            )
        for i, (name, cell) in enumerate(cells.items()):
            said = (
                f"{name}: {label(metrics[0])} {shown(metrics[0], cell[0][0])}, {label(metrics[k])}"
                f" {shown(metrics[k], cell[k][0])}"
            )
            drawn += spot(
                i, said, links.get(name), place(xs)(cell[k][0]), *(place(ys, 4)(v) for v in cell[0])
            )
        caption = f"{label(metrics[0])} (up) by {label(metrics[k])} (across)"
        figures += f"<figure><figcaption>{escape(caption)}</figcaption>{plane(xs, ys, drawn)}</figure>"
    note = (
        "A point is a model, its line the 95 % bootstrap interval over held-out rows; a click opens its run."
    )
    return section("The front", f'<div class="maps">{figures}</div>{key(cells)}', note=note)


def _table(
    found: Mapping[str, Any],
    names: Sequence[str],
    cells: Mapping[str, list],
    links: Mapping[str, str],
    kept: Sequence[str],
) -> str:
    goals, metrics = list(found["metrics"]), list(found["metrics"].values())
    head = "".join(
        f'<th scope="col">{escape(g)}</th>'
        for g in ("", *(f"weight of {g}" for g in goals), *(label(m) for m in metrics))
    )
    weights = {
        BEFORE: [""] * len(goals),
        **{n: [f"{w:.3g}" for w in v] for n, v in zip(names, found["preferences"], strict=True)},
    }
    body = ""
    for name, cell in cells.items():
        link = f'<a href="{escape(links[name])}">{escape(name)}</a>' if name in links else escape(name)
        body += f'<tr><th scope="row">{link}{" ★" if name in kept else ""}</th>' + "".join(
            f"<td>{w}</td>" for w in weights[name]
        )
        for metric, (mean, low, high) in zip(metrics, cell, strict=True):
            span = (
                f"<i> {escape(shown(metric, low))} to {escape(shown(metric, high))}</i>" if low < high else ""
            )
            body += f"<td>{escape(shown(metric, mean))}{span}</td>"
        body += "</tr>"
    begins = ", ".join(f"{g} {w:.3g}" for g, w in zip(goals, found["worst"], strict=True))
    note = (
        "★: on the front, no model is as good in every goal and better in one. The hypervolume is counted"
        f" from {begins}."
    )
    return section(
        "Every model",
        '<div class="wide"><table'
        f' class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        note=note,
    )


def _again(report: Any, folder: Path) -> str:
    best = os.path.relpath(report.folder, folder)
    made = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(who)}</dd></div>" for what, who in versions())
    said = (
        f'<p>Best in the middle: <a href="{escape(best)}/report.html">{escape(best)}</a>. Each run\'s page'
        " says how to repeat it.</p>"
    )
    return section("How to repeat it", f'<dl class="tiles">{made}</dl>{said}')


STAIRS = (
    ".stairs{fill:none;stroke:var(--soft);stroke-width:1;stroke-dasharray:4"
    " 3;vector-effect:non-scaling-stroke}"
)
