"""Which base model a run was tuned on: marks of its files, so that another one under the same name is noticed
when the run is resumed, loaded or exported.

The mark of a file is its size and a checksum of its beginning (the header of a safetensors file) and of
samples from all over it; the checksum of all of it is made beside the first steps of training. Where the
times of the files are still those of the mark, all of it is not read again.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe.model_names import resolve_model
from luthier.storage import manifest

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
TEXTS = (  # what else decides what the network computes, and what it reads
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
HEADER = 1 << 20  # bytes at the beginning of a file
SAMPLE, SAMPLES = 1 << 12, 256  # bytes of a sample, and how many


def mark(model: str) -> dict[str, dict[str, Any]]:
    """File name -> {size, time, sample}, of a model's folder; empty where it is not on this machine."""
    folder = folder_of(model)
    if folder is None:
        return {}
    marks = {}
    for pattern in (*WEIGHTS, *TEXTS):
        for path in sorted(folder.glob(pattern)):
            status = path.stat()
            marks[path.name] = {
                "size": status.st_size,
                "time": status.st_mtime_ns,
                "sample": _sample(path, status.st_size),
            }
    return marks


def complete(model: str, marks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same marks with the checksum of each whole file."""
    folder = folder_of(model)
    completed = {}
    for name, entry in marks.items():
        completed[name] = dict(entry)
        if folder is not None and (folder / name).is_file():
            completed[name]["checksum"] = _checksum(folder / name, entry["size"], entry["time"])
    return completed


def check(model: str, marks: Any, run: Path) -> None:
    """Raises RecipeError where the model is not the one whose marks the run in a folder holds."""
    now = mark(model)
    if not marks or not now or not isinstance(marks, Mapping):
        return
    name = _difference(model, marks, now)
    if name is not None:
        raise RecipeError(
            f"{model} has changed since {run} was tuned on it ({name} differs): put the former model back, or"
            " tune the present one in another folder",
            "base_changed",
        )


def _difference(model: str, marks: Mapping[str, Any], now: Mapping[str, dict[str, Any]]) -> str | None:
    """The first file that is another one."""
    for name in sorted(marks.keys() ^ now.keys()):
        return name
    folder = folder_of(model)
    for name, entry in marks.items():
        here = now[name]
        if not isinstance(entry, Mapping) or (entry.get("size"), entry.get("sample")) != (
            here["size"],
            here["sample"],
        ):
            return name
        if folder is None or "checksum" not in entry or entry.get("time") == here["time"]:
            continue
        if _checksum(folder / name, here["size"], here["time"]) != entry["checksum"]:
            return name
    return None


class BaseMark:
    """The marks of the base that a run began on, made complete while it trains."""

    def __init__(self) -> None:
        self.marks: dict[str, dict[str, Any]] = {}
        self.thread: threading.Thread | None = None

    def begin(self, model: str) -> dict[str, dict[str, Any]]:
        """The marks so far; the checksums of the whole files are made in a thread."""
        self.marks = mark(model)

        def add_checksums() -> None:
            self.marks = complete(model, self.marks)

        self.thread = threading.Thread(target=add_checksums, daemon=True, name="base checksums")
        self.thread.start()
        return self.marks

    def finish(self) -> dict[str, dict[str, Any]] | None:
        """The complete marks, once; None afterwards, or where none were begun."""
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        return self.marks


def folder_of(model: str) -> Path | None:
    """Where a model's files lie; of one from the hub, in its cache."""
    path = Path(resolve_model(model))
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(str(path), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _sample(path: Path, size: int) -> str:
    """CRC-32 of a file's beginning, and of samples evenly from the rest."""
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(HEADER))
        if size > HEADER:
            for i in range(SAMPLES):
                file.seek(HEADER + (size - HEADER) * i // SAMPLES)
                crc = zlib.crc32(file.read(SAMPLE), crc)
    return f"{crc:08x}"


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, time: int) -> str:
    """Of all of a file, once for each that has this size and time."""
    return manifest.checksum(path)
