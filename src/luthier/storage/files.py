"""Files that are there whole or not at all: written beside and renamed, so a kill leaves the old or the new.

A run folder: recipe.yaml (resolved), checkpoint-N/, metrics.jsonl, report.json, report.html, README.md,
quarantine.jsonl, rows.jsonl (where stages made rows), failed.json (of a run that failed), and what was tuned
at the root.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import DiskError, RecipeError

QUANTIZATION = "quantization.json"  # beside an adapter: what its base's weights were kept in

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into a DiskError."""
    intact = "everything saved so far is intact; free some space and run the same command again"
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            place = path if path.exists() else path.parent
            free = shutil.disk_usage(place).free / 2**20
            raise DiskError(f"the disk of {path} is full ({free:.0f} MB free); {intact}") from None
        if error.errno in FORBIDDEN:
            raise DiskError(f"{path} cannot be written ({error.strerror}); give another output_dir") from None
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error, without a number
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskError(f"the disk of {path} is full; {intact}") from None
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """A folder for oneself, made if it is not there: while one process has it, another is refused. The lock's
    file holds the process id.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a", encoding="ascii")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"another process is using {folder}", "busy") from None
        with disk_errors(folder):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises DiskError."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # processes of one run may write the same at once
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=float) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: list[dict]) -> None:
    """A line of JSON for each row."""
    lines = []
    for row in rows:
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    write_text(path, "".join(lines))


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of it is written. Raises DiskError."""
    beside = path.with_name(path.name + ".part")
    with disk_errors(path):
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
            for entry in beside.rglob("*"):
                if entry.is_file():
                    with open(entry, "rb") as file:
                        os.fsync(file.fileno())
            old = path.with_name(path.name + ".old")
            if path.exists():
                os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
