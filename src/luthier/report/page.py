"""report.html and README.md of a run folder: the answer first; then metrics, curves, generations, data,
recipe.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.report import benchmarks
from luthier.report.card import card
from luthier.report.chart import Curve, Figure, curves_figure, curves_table, smoothed
from luthier.report.html import render
from luthier.report.numbers import (
    HELD_OUT,
    cost,
    damaged_generations,
    format_duration,
    generations,
    headline,
    metric_of,
    metric_rows,
    row_counts,
    split_rows,
)
from luthier.report.retention import read_skills, sentence, table
from luthier.report.text import run_title
from luthier.report.thumbnails import thumbnails
from luthier.storage import files

# of a log line; whatever else stands there gets a small chart
PLAIN = ("step", "loss", "learning_rate", "tokens", "seconds", "eval_loss")
EXTRA = 12  # small charts at most
GENERATIONS = 12  # shown
RECIPE = 20_000  # characters of a recipe shown: rows given in Python stand in it


def write_report(recipe: Any, report: Any, logged: Sequence[dict], folder: Path) -> None:
    """report.html and README.md in a run folder. logged: the lines of metrics.jsonl."""
    files.write_text(folder / "report.html", page(recipe, report, logged, folder))
    files.write_text(folder / "README.md", card(recipe, report, folder))


def page(recipe: Any, report: Any, logged: Sequence[Mapping], folder: Path) -> str:
    """The whole page."""
    folder = Path(folder)
    stats = report.stats
    tiles = list(cost(stats))
    if stats.get("device"):
        tiles.append(("device", f"{stats['device']}, {stats.get('dtype', '')}".rstrip(", ")))
    measured_on = stats.get("measured_on", HELD_OUT)
    skills = read_skills(folder)
    whole, parts = split_rows(metric_rows(report), skills)
    text = recipe.yaml()
    if len(text) > RECIPE:
        text = f"{text[:RECIPE]}\n... (complete recipe: recipe.yaml)"
    return render(
        "run.html.j2",
        title=run_title(recipe),
        headline=headline(report),
        trend=stats.get("trend", ""),
        tiles=tiles,
        metrics=whole,
        parts=parts,
        benchmarks=[benchmarks.table(entry) for entry in benchmarks.read_benchmarks(folder)],
        skills=table(skills),
        lost=sentence(skills),
        held_out_rows=stats.get("held_out_rows") and stats.get("evaluated_rows", stats["held_out_rows"]),
        measured_on=measured_on,
        training=training(logged, measured_on),
        generations=shown_generations(folder),
        rows=_rows(folder),
        data_note=_data_note(stats),
        notes=report.notes,
        recipe_file=shlex.quote(str(folder / "recipe.yaml")),
        again=shlex.quote(f"{folder}-again"),
        fingerprint=recipe.fingerprint(),
        recipe=text,
    )


def training(logged: Sequence[Mapping], measured_on: str = HELD_OUT) -> dict[str, Any] | None:
    """Figures and a table of what was logged; None where no loss was. measured_on: the rows of evaluations
    between steps.
    """
    raw = series(logged, "loss")
    if not raw:
        return None
    loss = [
        Curve("each step", "raw", raw, width=1),
        Curve("smoothed", "wood", smoothed(raw)),
        Curve(measured_on, "held", series(logged, "eval_loss")),
    ]
    extra: list[Curve] = []
    small: list[Figure | None] = []
    for name in ("learning_rate", *_extra(logged)):
        curve = Curve(_log_label(name), "wood", series(logged, name))
        extra.append(curve)
        small.append(curves_figure(curve.name, [curve], height=150))
    seconds = sum(line.get("seconds", 0) for line in logged)
    tokens = sum(line.get("tokens", 0) for line in logged)
    note = f"{len(raw):,} logged steps"
    if seconds:
        note += f", {tokens:,} tokens in {format_duration(seconds)}"
    return {
        "note": f"{note}.",
        "loss": curves_figure("loss by step", loss, zero=True, log=True),
        "small": list(filter(None, small)),
        "table": curves_table([Curve("loss", "raw", raw), loss[2], *extra]),
    }


def _log_label(name: str) -> str:
    """'eval sequence accuracy' of eval_accuracy."""
    if name.startswith("eval_"):
        return f"eval {metric_of(name.removeprefix('eval_')).label}"
    return name.replace("_", " ")


def series(logged: Sequence[Mapping], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever a value was logged and is a number."""
    points = []
    for line in logged:
        value = line.get(name)
        if "step" in line and isinstance(value, (int, float)) and math.isfinite(value):
            points.append((line["step"], float(value)))
    return points


def _extra(logged: Sequence[Mapping]) -> list[str]:
    """What else was logged as numbers, without parts of metrics; one that never changes is no curve."""
    names: dict[str, None] = {}
    for line in logged:
        names |= dict.fromkeys(line)
    out = []
    for name in names:
        values = list(dict(series(logged, name)).values())
        if name not in PLAIN and "/" not in name and (len(values) == 1 or len(set(values)) > 1):
            out.append(name)
    return out[:EXTRA]


def shown_generations(folder: Path) -> dict[str, Any] | None:
    """The first generations with how many became better or worse, and what of them is damaged; None where
    nothing was generated.
    """
    rows, damage = generations(folder), damaged_generations(folder)
    if not rows and not damage:
        return None
    note = f"{len(rows)} prompts"
    if len(rows) > GENERATIONS:
        note = f"The first {GENERATIONS} of {note}"
    gains = []
    for row in rows:
        if row["score_before"] is not None and row["score_after"] is not None:
            gains.append(np.sign(row["score_after"] - row["score_before"]))
    if gains:
        note += f"; of all, {gains.count(1)} better, {gains.count(-1)} worse, {gains.count(0)} unchanged"
    visible = [{**row, "images": thumbnails(row.get("images"))} for row in rows[:GENERATIONS]]
    return {"note": "; ".join([note, *damage]) + ".", "rows": visible}


def _rows(folder: Path) -> list[str]:
    """Training rows as the model reads them, as the run left them."""
    path = folder / "shown.json"
    if not path.is_file():
        return []
    rows = files.read_json(path)
    return list(map(str, rows)) if isinstance(rows, list) else []


def _data_note(stats: Mapping[str, Any]) -> str:
    phrases = []
    if counts := row_counts(stats):
        phrases.append(counts)
    if stats.get("data_rows"):
        phrases.append(f"{stats['data_rows']:,} training rows, {stats.get('row_tokens', 0):,} tokens")
    if stats.get("supervised_share"):
        phrases.append(f"{100 * stats['supervised_share']:.0f}% of the tokens are supervised (highlighted)")
    if stats.get("longest"):
        phrases.append(f"the longest row has {stats['longest']:,} tokens")
    if stats.get("cut"):
        phrases.append(f"{stats['cut']:,} rows truncated to max_length")
    if stats.get("bad_rows"):
        phrases.append(f"{stats['bad_rows']:,} rows rejected, with reasons, in quarantine.jsonl")
    return "; ".join(phrases) + "." * bool(phrases)
