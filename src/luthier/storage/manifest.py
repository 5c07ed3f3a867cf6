"""Checksums of files: manifest.json in a checkpoint, written after everything else and compared before
anything is read. A single bit that has changed since is noticed, in the manifest itself too.

CRC-32, since what is to be noticed is damage, not forgery: it reads more than a gigabyte a second.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.storage import files

MANIFEST = "manifest.json"
PARTS = ("files", "run")  # checksums by name: of the folder itself, and of the run that it is of
CHUNK = 1 << 20  # bytes read at a time


def checksum(path: Path) -> str:
    """CRC-32 of a file's content, as eight hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def text_checksum(value: Any) -> str:
    """The same of a value that is written as JSON, whatever the order of its keys."""
    as_read = json.loads(json.dumps(value, default=float))  # keys that are numbers become text
    return f"{zlib.crc32(json.dumps(as_read, sort_keys=True).encode()):08x}"


def write(folder: Path, run_files: Iterable[Path] = ()) -> None:
    """manifest.json of all files in a folder, and of files of the run that stay as they are meanwhile."""
    own, run = {}, {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            own[path.name] = checksum(path)
    for path in run_files:
        if path.is_file():
            run[path.name] = checksum(path)
    files.write_text(folder / MANIFEST, _text({"files": own, "run": run}))


def _text(manifest: Mapping[str, Any]) -> str:
    """As it is written, with a checksum of its own."""
    parts = {key: manifest[key] for key in PARTS}
    return json.dumps({**parts, "manifest": text_checksum(parts)}, indent=1, sort_keys=True) + "\n"


def damage(folder: Path) -> str | None:
    """What is wrong with a folder's files, for a sentence; None where all are as they were written, or where
    there is no manifest, as version 0.1 wrote none.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = _read(folder)
    if manifest is None:
        return f"its {MANIFEST} is damaged"
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != expected:
            return f"{name} is damaged: its checksum differs"
    return None


def changed_run_files(folder: Path, run: Path) -> list[str]:
    """Which files of the run are missing or others than when the checkpoint in `folder` was written."""
    manifest = _read(folder)
    if manifest is None:
        return []
    changed = []
    for name, expected in manifest["run"].items():
        if not (run / name).is_file() or checksum(run / name) != expected:
            changed.append(name)
    return changed


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where it is not, letter for letter, as it was written."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in PARTS):
        return None
    return manifest if _text(manifest) == text else None
