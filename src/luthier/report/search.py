"""report.html of a hyperparameter search: the answer first, what was chosen on tuning and on test seeds,
every configuration on maps and in a table, then the comparison on test seeds.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.report import comparison
from luthier.report.chart import Figure, scatter_figure
from luthier.report.comparison import axis, run_page
from luthier.report.html import render
from luthier.report.numbers import format_difference, format_duration, format_metric

MOST = 200  # configurations in the table
RECIPE = 20_000  # characters of a recipe shown
EMPTY = {"mean": "", "low": "", "high": "", "best": False}


def page(result: Mapping[str, Any]) -> str:
    """result: what `luthier.search` gives (search.json)."""
    spent = f"{result['full_runs']:.3g} full runs per seed, {format_duration(result['seconds'])}"
    tiles = [
        ("model", result["model"]),
        ("goals", ", ".join(goal["name"] for goal in result["goals"])),
        ("constraints", "; ".join(result["limits"]) or "none"),
        ("searcher", result["sampler"]["name"]),
        ("budget used", spent),
        ("tuning seeds", ", ".join(map(str, result["seeds"]))),
        ("test seeds", ", ".join(map(str, result["test_seeds"]))),
    ]
    trials = result["trials"]
    return render(
        "search.html.j2",
        title=" × ".join(dimension["name"] for dimension in result["space"]),
        headline=result["sentence"],
        tiles=tiles,
        goals=result["goals"],
        candidates=_candidates(result),
        candidates_note=_candidates_note(result),
        figures=maps(result),
        trials=[trial_row(result, trial) for trial in trials[:MOST]],
        trials_note=f"The first {MOST}; search.json has all {len(trials)}." if len(trials) > MOST else "",
        tested=comparison.sections(result["comparison"]) if result["comparison"] else None,
        space=[describe_dimension(dimension) for dimension in result["space"]],
        commands=commands(result),
        recipe=result["recipe"],
        date=result["date"],
    )


# -------------------------------------------------------------------------------------------- what was chosen


def _candidates(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the recipe and of each configuration that was chosen: each goal on tuning and on test seeds, and the
    gap.
    """
    rows = []
    for one in [*filter(None, [result.get("baseline")]), *result["chosen"]]:
        cells = []
        for goal in result["goals"]:
            name, metric = goal["name"], goal["metric"]
            tuning, test, gap = (one[key].get(name) for key in ("tuning", "test", "gap"))
            low, high = one.get("interval", {}).get(name, (0, 0))
            cells.append(EMPTY | {"mean": format_metric(metric, tuning)})
            cells.append(
                EMPTY
                if test is None
                else comparison.cell_of(metric, {"mean": test, "low": low, "high": high})
            )
            cells.append(EMPTY if gap is None else EMPTY | {"mean": format_difference(metric, gap)})
        link = "" if one["name"] == "recipe" else f"{one['name']}.yaml"
        rows.append(
            {"name": one["name"], "link": link, "setting": one["description"] or "unchanged", "cells": cells}
        )
    return rows


def _candidates_note(result: Mapping[str, Any]) -> str:
    rows = "both on the same held-out rows"
    if result.get("test_data"):
        rows = "the first on held-out rows, the second on test rows"
    note = (
        "Tuning: mean over the seeds by which a configuration was chosen, hence optimistic. Test: mean over"
        f" other seeds; {rows}. Gap: how much worse the second is."
    )
    if any("interval" in one for one in result["chosen"]):
        note += " Of fronts: 95 % intervals of the mean over test seeds."
    return note


# ---------------------------------------------------------------------------------------------- every trial


def maps(result: Mapping[str, Any]) -> list[Figure]:
    """The first goal by each other; of one goal, by the order of trials."""
    first, *others = result["goals"]
    trials = [trial for trial in result["trials"] if trial["share"] >= 1 and not trial["failed"]]
    if len(trials) < 2:
        return []
    figures = [_map(result, trials, first, goal) for goal in others or [None]]
    return [figure for figure in figures if figure]


def _map(
    result: Mapping[str, Any],
    trials: Sequence[Mapping],
    up: Mapping[str, Any],
    across: Mapping[str, Any] | None,
) -> Figure | None:
    points = []
    for i, trial in enumerate(trials):
        x = i if across is None else trial["goals"][across["name"]]
        y = trial["goals"][up["name"]]
        if x is None or y is None:
            continue
        chosen = trial["number"] in result["front"]
        points.append(
            {
                "text": _point_text(result["goals"], trial),
                "colour": "edge" if trial["violation"] > 0 else "wood",
                "hollow": not chosen and trial["violation"] <= 0,
                "shape": "square" if trial["kind"] == "recipe" else "circle",
                "x": x,
                "y": y,
                "link": run_page(trial["runs"][0], result["folder"]) if trial["runs"] else None,
            }
        )
    if not points:
        return None
    order = {"label": "trial", "percent": False}
    return scatter_figure(order if across is None else axis(across["metric"]), axis(up["metric"]), points)


def _point_text(goals: Sequence[Mapping[str, Any]], trial: Mapping[str, Any]) -> str:
    lines = [trial["description"]]
    for goal in goals:
        if (value := trial["goals"][goal["name"]]) is not None:
            lines.append(f"{goal['name']} {format_metric(goal['metric'], value)}")
    return "\n".join(lines)


def trial_row(result: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of all trials."""
    return {
        "number": trial["number"],
        "setting": trial["description"],
        "chosen": trial["share"] >= 1 and trial["number"] in result["front"],
        "failed": trial["failed"] or "",
        "share": f"{trial['share']:.0%}",
        "goals": [format_metric(goal["metric"], trial["goals"][goal["name"]]) for goal in result["goals"]],
        "seconds": f"{trial['seconds']:.0f}",
    }


# ------------------------------------------------------------------------------------------- how to repeat it


def describe_dimension(dimension: Mapping[str, Any]) -> str:
    """'learning_rate: 0.0001 to 0.01 (log scale)'."""
    if "choices" in dimension:
        text = f"{dimension['name']}: {', '.join(map(str, dimension['choices']))}"
    else:
        text = f"{dimension['name']}: {dimension['low']:g} to {dimension['high']:g}"
        if dimension["log"]:
            text += " (log scale)"
    if when := dimension.get("when"):
        text += f", where {when[0]} is {when[1]}"
    return text


def commands(result: Mapping[str, Any]) -> list[dict[str, str]]:
    commands = []
    for one in result["chosen"]:
        path = shlex.quote(os.path.join(result["folder"], one["name"]))
        commands.append(
            {"name": one["name"], "setting": one["description"], "text": f"luthier tune {path}.yaml"}
        )
    return commands
