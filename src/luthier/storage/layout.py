"""What lies where in a run's folder, and in a plan's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from luthier.storage import files

STATE = "run.json"  # which run lies here
BEFORE = "before.json"  # metrics before training
ROWS = "rows.jsonl"  # what the stages made of the data
LOG = "metrics.jsonl"  # a line for each logged step
PAUSED = "paused.json"  # of a run that pauses: what it measured there
REPORT = "report.json"
FAILED = "failed.json"  # of a run that failed: which outcome it was, and the sentence
QUARANTINE = "quarantine.jsonl"  # unusable rows, with reasons


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


def saved_network(folder: Path) -> dict[str, Any]:
    """What the data of a finished run implied for its network; class numbers are numbers again."""
    network = files.read_json(folder / STATE).get("network", {})
    if "id2label" in network:
        network = {**network, "id2label": {int(k): v for k, v in network["id2label"].items()}}
    return network
