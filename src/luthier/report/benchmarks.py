"""Public benchmarks of a run, as `luthier evaluate` leaves them in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import Damaged
from luthier.report.numbers import format_number
from luthier.storage import files

RESULTS = "benchmarks.json"
HEAD = ("task", "questions", "before", "after", "change", "interval (95%)")


def read_benchmarks(folder: Path) -> list[dict[str, Any]]:
    """What was measured, one entry for each call; none where nothing was."""
    path = folder / RESULTS
    if not path.is_file():
        return []
    entries = files.read_object(path, benchmarks=list)["benchmarks"]
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
            raise Damaged(f"{path} is damaged: an entry has no results")
    return entries


def note(entry: Mapping[str, Any]) -> str:
    """How it was measured."""
    parts = [f"lm-eval {entry['lm_eval']}, {entry['date']}"]
    if entry["limit"]:
        parts.append(f"the first {entry['limit']} questions of each task")
    parts.append("in the chat template" if entry["chat"] else "without the chat template")
    if entry["base"]:
        parts.append(f"before: {entry['base']}")
    return "; ".join(parts) + "."


def table(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry as {note, head, rows}."""
    return {"note": note(entry), "head": HEAD, "rows": list(map(line_cells, entry["results"]))}


def line_cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """A task's metric before and after, with the interval where there is one."""
    name = f"{line['task']} {line['metric']}"
    if line["filter"] != "none":
        name += f" ({line['filter']})"
    share = "low" in line and -1 <= line["low"] and 0 <= line["after"] <= 1
    interval = change = ""
    if "difference" in line:
        change = signed(line["difference"], share)
    if "low" in line:
        interval = f"{signed(line['low'], share)} to {signed(line['high'], share)}"
    before, after = line.get("before"), line["after"]
    return (
        name,
        str(line["rows"]),
        format_number(before, share),
        format_number(after, share),
        change,
        interval,
    )


def signed(value: float, share: bool) -> str:
    """With its sign; of shares in points."""
    sign = {1: "+", -1: "−"}.get((value > 0) - (value < 0), "")
    return sign + (f"{100 * abs(value):.1f}" if share else format_number(abs(value)))
