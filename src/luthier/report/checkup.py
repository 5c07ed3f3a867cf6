"""The page of `luthier inspect`: what fine-tuning changed in metrics, weights, calibration and generations.

model/weight_changes measures the weights; metrics and generations are the evaluators'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from luthier.model.weight_changes import ALIKE, FIRST, SAME
from luthier.registry import former_metrics
from luthier.report.changes import dot_plots, shown_changes, verdict
from luthier.report.chart import Curve, Figure, curves_figure, curves_table
from luthier.report.comparison import calibration_figure
from luthier.report.html import render
from luthier.report.numbers import MetricRow, format_number, headline, metric_rows, split_rows
from luthier.report.page import shown_generations
from luthier.report.retention import sentence, skill_of, table

GENERATION = (
    "generated_tokens",
    "distinct_2",
    "distinct_answers",
    "answer_length",
    "length_ratio",
    "length_correlation",
)
REFUSAL = ("refused_unsafe", "refused_safe")
# of the table of weight changes: what weight_changes calls it, times what, in which unit
COLUMNS = {
    "change": ("moved", 100, "%"),
    "unchanged": ("unchanged", 100, "%"),
    "effective rank": ("rank", 1, ""),
    "rank": ("rank_ratio", 100, "%"),
    "new directions": ("new", 1, ""),
    "overlap": ("overlap", 100, "%"),
}
RETENTION = ("retention_loss", "retention_accuracy")


def page(result: Mapping[str, Any], folder: Path) -> str:
    """result: what `luthier.inspect` gives. folder: where the evaluators left generations and calibration."""
    base, tuned = result["base"], result["tuned"]
    report = SimpleNamespace(
        before=base["metrics"],
        after=tuned["metrics"],
        losses=[1],
        stats={"measured_on": result["measured_on"], "steps": 1},
        folder=folder,
    )
    skills = [skill_of(values) for values in result.get("skills", ())]
    changes = shown_changes([skill_of(values) for values in result.get("changes", ())], skills)
    whole, parts = split_rows(metric_rows(report), skills)
    groups = _grouped(whole)
    return render(
        "inspect.html.j2",
        title=f"{base['model']} → {tuned['model']}",
        headline=verdict(changes) or headline(report),
        dots=dot_plots(changes),
        measured=f"On {result['rows']:,} {result['measured_on']}.",
        task=groups["task"],
        retention=groups["retention"],
        parts=parts,
        skills=table(skills),
        lost=sentence(skills),
        weights=_weights(result.get("weights")),
        generation=groups["generation"],
        refusal=groups["refusal"],
        calibration=_calibration(folder),
        generations=shown_generations(folder),
        notes=result["notes"],
    )


def _grouped(rows: Sequence[MetricRow]) -> dict[str, list[MetricRow]]:
    """Metrics by the section of the page that shows them."""
    groups: dict[str, list[MetricRow]] = {"task": [], "retention": [], "generation": [], "refusal": []}
    sections = {"retention": RETENTION, "generation": GENERATION, "refusal": REFUSAL}
    for row in rows:
        name = former_metrics().get(row.name, row.name)
        section = next((key for key, names in sections.items() if name in names), "task")
        groups[section].append(row)
    return groups


def _weights(changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Figures and a table of what `weight_changes` measured."""
    if not changes or not changes["matrices"]:
        return None
    rows: Sequence[Mapping[str, Any]] = changes["matrices"]
    moved = [row for row in rows if row["moved"]]
    note = f"{len(moved)} of {len(rows)} matrices inside the layers changed."
    if not moved:
        return {"note": note, "figures": [], "table": None, "curves": None}
    note += (
        " Change: its norm relative to that of the weights. Unchanged: entries that moved by at most"
        f" {SAME:g}. Rank: effective rank of the change, and its numerical rank by the largest possible. New"
        f" directions: how many of the first {FIRST} singular vectors have a cosine below {ALIKE} with each"
        " of the base's; overlap: of the spaces that they span. Means over matrices."
    )
    if changes["unlike"]:
        note += f" {len(changes['unlike'])} matrices exist in only one model or differ in shape."
    layers, spectrum = _by_layer(rows, "moved"), list(enumerate(changes["spectrum"], 1))
    shares = [
        Curve("unchanged %", "held", _by_layer(rows, "unchanged")),
        Curve("overlap %", "good", _by_layer(moved, "overlap")),
        Curve("rank %", "raw", _by_layer(moved, "rank_ratio")),
    ]
    figures: list[Figure | None] = [
        curves_figure(
            "change by layer, % of the weights' norm",
            [Curve("change %", "wood", layers)],
            x="layer",
            height=180,
            zero=True,
        ),
        curves_figure(
            f"singular values of the largest change ({changes['of']}), relative to the first",
            [Curve("singular value", "held", spectrum)],
            x="index",
            height=180,
            zero=True,
        ),
        curves_figure(
            "unchanged entries, overlap of the leading directions, rank of the change, by layer",
            shares,
            x="layer",
            height=180,
            zero=True,
        ),
    ]
    return {
        "note": note,
        "figures": [figure for figure in figures if figure],
        "table": _by_part(rows),
        "curves": curves_table([Curve("change %", "wood", layers), *shares], x="layer"),
    }


def _by_layer(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(layer, mean of a number of its matrices in percent)."""
    by_layer = defaultdict(list)
    for row in rows:
        if row["layer"] is not None and key in row:
            by_layer[row["layer"]].append(100 * row[key])
    return sorted((float(layer), _mean(values)) for layer, values in by_layer.items())


def _by_part(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the matrices of each kind, as {head, rows}."""
    by_part = defaultdict(list)
    for row in rows:
        by_part[row["part"]].append(row)
    out = []
    for part, some in by_part.items():
        line = [part]
        for key, factor, unit in COLUMNS.values():
            values = [factor * row[key] for row in some if key in row]
            line.append(format_number(_mean(values)) + unit if values else "")
        out.append(line)
    return {"head": ["matrix", *COLUMNS], "rows": out}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _calibration(folder: Path) -> list[Figure]:
    figures = []
    for when in ("before", "after"):
        figures += calibration_figure(Path(folder) / f"calibration-{when}.json", when)
    return figures
