"""What lies where in a run's folder, and in a plan's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from luthier.errors import Damaged
from luthier.storage import files, manifest

STATE = "run.json"  # which run lies here
CHECKSUM = "checksum"  # in run.json: of all the rest of it
BEFORE = "before.json"  # metrics before training
ROWS = "rows.jsonl"  # what the stages made of the data
LOG = "metrics.jsonl"  # a line for each logged step
STATUS = "status.json"  # of a run that goes on: what it is doing now
PAUSED = "paused.json"  # of a run that pauses: what it measured there
REPORT = "report.json"
FAILED = "failed.json"  # of a run that failed: which outcome it was, and the sentence
BEST = "best"  # the weights of the best evaluation
CODES = "quantized.safetensors"  # a quantized base's weights
INLINE = ("data-*.jsonl", "eval_data-*.jsonl")  # rows given from Python
RENDERING = "rendering.json"  # what else rows were rendered with: the date, template variables, system prompt
QUARANTINE = "quarantine.jsonl"  # unusable rows, with reasons
STAGE_METRICS = "stage_metrics.json"  # what the stages measured on the rows
DROPPED = "dropped.jsonl"  # rows that stages left out: which, at which stage, why
STAGES = "stages"  # what stages need to go on where they ended: rows so far, answers, gradients


def constant_files(folder: Path) -> list[Path]:
    """Files of a run that do not change between its first step and its last, and that it reads again where it
    is resumed.
    """
    paths = [folder / BEFORE, folder / ROWS, folder / CODES, folder / RENDERING]
    for pattern in INLINE:
        paths += sorted(folder.glob(pattern))
    return [path for path in paths if path.is_file()]


def run_folder(plan: Path, number: int) -> Path:
    """The folder of a plan's run; a plan that version 0.1 began goes on in its own folders."""
    former = plan / f"act-{number}"
    return former if former.is_dir() else plan / f"run-{number}"


def run_folders(plan: Path) -> list[Path]:
    """The folders of a plan's runs that are there, in order."""
    numbered = []
    for path in plan.glob("*-*"):
        match = re.fullmatch(r"(?:run|act)-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    return [path for _, path in sorted(numbered)]


def read_state(folder: Path) -> dict[str, Any]:
    """run.json. Raises Damaged where it is missing or is not what a run writes."""
    return files.read_object(folder / STATE, fingerprint=str, data=str, finished=bool)


def state_is_unchanged(state: dict[str, Any]) -> bool:
    """Whether run.json is as it was written; version 0.1 did not write its checksum."""
    rest = {key: value for key, value in state.items() if key != CHECKSUM}
    return state.get(CHECKSUM) in (None, manifest.text_checksum(rest))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """run.json with its checksum."""
    rest = {key: value for key, value in state.items() if key != CHECKSUM}
    files.write_json(folder / STATE, {**rest, CHECKSUM: manifest.text_checksum(rest)})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read; none where there is no file."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [entry for entry in map(log_entry, files.read_lines(path)) if entry is not None]


def log_entry(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is cut short or damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    return entry


def saved_rendering(folder: Path | None) -> dict[str, Any]:
    """What a run's rows were rendered with beside its recipe: {"today": "2026-12-31", "chat_template_kwargs",
    "system"}, each where there is one; empty where the folder holds no run or nothing of the kind.
    """
    if folder is None or not (folder / RENDERING).is_file():
        return {}
    return files.read_object(folder / RENDERING)


def saved_network(folder: Path) -> dict[str, Any]:
    """What the data of a finished run implied for its network; class numbers are numbers again. Raises
    Damaged.
    """
    network = read_state(folder).get("network", {})
    if not isinstance(network, dict):
        raise Damaged(f"{folder / STATE} is damaged: network is not an object")
    if "id2label" in network:
        try:
            names = {int(k): v for k, v in network["id2label"].items()}
        except (AttributeError, ValueError):
            raise Damaged(f"{folder / STATE} is damaged: id2label does not list classes") from None
        network = {**network, "id2label": names}
    return network
