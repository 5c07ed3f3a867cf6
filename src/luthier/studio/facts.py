"""What the table of runs shows of each: its methods, what it measured before and after, its tags and note.

Every file is read again only where it has changed, so that a page may ask every few seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.errors import Damaged, RecipeError
from luthier.report.numbers import metric_rows
from luthier.storage import files
from luthier.storage.bounded_yaml import load_yaml, read_yaml
from luthier.storage.layout import BEFORE, REPORT, STATE

SEARCH = "search_spec.json"  # of a search: which one lies in a folder
LABELS = "labels.json"  # the tags and the note that someone gave a run
REPORT_TYPES = {"folder": str, "before": dict, "after": dict, "stats": dict, "notes": list}
MAX_TAGS = 20
MAX_TAG = 40  # characters
MAX_NOTE = 20_000
SHOWN_STATS = ("seconds", "tokens_per_second", "peak_memory_mb", "moving", "all", "held_out_rows", "steps")


@dataclass(frozen=True)
class Measured:
    """As much of a report as its metrics are made from."""

    before: dict
    after: dict
    stats: dict
    losses: tuple = ()  # of each logged step, where they are of use


def read_object(path: Path, **types: Any) -> dict[str, Any]:
    """A JSON object as `files.read_object` reads it; empty where it is not there or not whole."""
    try:
        return files.read_object(path, **types)
    except Damaged:
        return {}


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name; those that are no numbers are left out."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


# ------------------------------------------------------------------------------------------- by the file


def as_it_stands(read: Callable[[Path], Any], path: Path) -> Any:
    """What a reader makes of a file, read again only where the file has changed."""
    try:
        status = path.stat()
    except OSError:
        return _read(read, path, None)
    return _read(read, path, (status.st_mtime_ns, status.st_size, status.st_ino))


@lru_cache(maxsize=4096)
def _read(read: Callable[[Path], Any], path: Path, version: Any) -> Any:
    """version: of the file. What was read under it is remembered, and must not be changed."""
    return read(path)


def methods_in(path: Path) -> dict[str, str]:
    """What a recipe's file, or that of a search, says of model, methods and rows, as text; empty where it
    cannot be read.
    """
    try:
        if path.name == SEARCH:
            keys = load_yaml(read_object(path, recipe=str).get("recipe", ""))
        else:
            keys = read_yaml(path)
    except RecipeError:
        return {}
    if not isinstance(keys, Mapping):
        return {}
    methods = {
        "model": method_name(keys.get("model") or "toy:lm"),
        "tuner": method_name(keys.get("tuner") or "lora"),
        "objective": method_name(keys.get("objective") or "sft"),
        "optim": method_name(keys.get("optim") or "adamw"),
    }
    for key in ("data", "learning_rate", "seed"):
        if isinstance(keys.get(key), (str, int, float)):
            methods[key] = str(keys[key])
    if isinstance(keys.get("data"), Mapping):
        methods["data"] = str(keys["data"].get("path", ""))
    return methods


def method_name(method: Any) -> str:
    """'lora' of {name: lora, r: 8}; a list of methods by their names."""
    if isinstance(method, list):
        return " + ".join(map(method_name, method))
    if isinstance(method, Mapping):
        return str(method.get("name", ""))
    return str(method)


def _report_in(path: Path) -> tuple[Measured, tuple[str, ...], str]:
    """What a report measured, its notes and its folder."""
    report = read_object(path, **REPORT_TYPES)
    if not report:
        return Measured({}, {}, {}), (), ""
    measured = Measured(numbers_in(report["before"]), numbers_in(report["after"]), report["stats"])
    return measured, tuple(map(str, report["notes"])), report["folder"]


# ------------------------------------------------------------------------------------------ of a run


def methods_of(folder: Path, recipe: Path | None) -> dict[str, str]:
    """Model, tuner, objective, optimizer, learning rate and data of a run. recipe: as it was submitted; the
    file that the run writes has every default in it and counts first.
    """
    written = folder / "recipe.yaml"
    methods: dict[str, str] = {}
    for path in (recipe, written):
        if path is not None and path.is_file():
            methods |= as_it_stands(methods_in, path)
    return methods


def report_of(folder: Path) -> tuple[Measured, tuple[str, ...], str]:
    """(what was measured, notes, folder) of a finished run; nothing of one that goes on."""
    return as_it_stands(_report_in, folder / REPORT)


def before_of(folder: Path) -> dict[str, float]:
    """Metrics before training."""
    return numbers_in(as_it_stands(read_object, folder / BEFORE))


def measured_on(folder: Path, stats: Mapping[str, Any]) -> str:
    """'held-out rows' or 'training rows'; empty where a run does not know it yet."""
    if "measured_on" in stats:
        return str(stats["measured_on"])
    return str(as_it_stands(read_object, folder / STATE).get("measured_on", ""))


def cells_in(path: Path) -> dict[str, dict[str, Any]]:
    """As `metric_cells`, of a report's file."""
    return metric_cells(_report_in(path)[0])


def metric_cells(measured: Measured) -> dict[str, dict[str, Any]]:
    """Whole metrics by name: {label, before, after, change, better, value}. value: for sorting, the last that
    was measured.
    """
    cells = {}
    for row in metric_rows(measured):
        if "/" not in row.name:
            value = measured.after.get(row.name, measured.before.get(row.name))
            cells[row.name] = {**asdict(row), "value": value}
    return cells


# -------------------------------------------------------------------------------------- tags and notes


def labels_of(folder: Path) -> dict[str, Any]:
    """{tags, note} of a run."""
    labels = as_it_stands(read_object, folder / LABELS)
    tags = labels.get("tags")
    if not isinstance(tags, list):
        tags = []
    plain = [str(tag)[:MAX_TAG] for tag in tags[:MAX_TAGS]]
    return {"tags": plain, "note": str(labels.get("note", ""))[:MAX_NOTE]}


def write_labels(folder: Path, tags: Sequence[str], note: str) -> dict[str, Any]:
    """Set the tags and the note of a run. Raises RecipeError where they are too many or too long."""
    plain = []
    for tag in tags:
        tag = re.sub(r"\s+", " ", tag).strip()
        if len(tag) > MAX_TAG or "," in tag:
            raise RecipeError(f"a tag has at most {MAX_TAG} characters and no comma")
        if tag and tag not in plain:
            plain.append(tag)
    if len(plain) > MAX_TAGS:
        raise RecipeError(f"a run has at most {MAX_TAGS} tags")
    if len(note) > MAX_NOTE:
        raise RecipeError(f"a note has at most {MAX_NOTE:,} characters")
    files.write_json(folder / LABELS, {"tags": plain, "note": note})
    return {"tags": plain, "note": note}
