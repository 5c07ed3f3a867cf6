"""What the pickers of the form offer: files of rows and models on this machine, and names on the hub."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.files import READERS
from luthier.errors import RecipeError

MOST = 500  # entries of a folder in an answer
MOST_READ = 20_000  # entries that are looked at
TEXTS = (".txt", ".md")  # readable as rows, but rarely meant as such
HUB_MODELS = (  # small models that need no account, with what they are; others go by their names too
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "135M, Apache 2.0: tries anything out, also without a GPU"),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", "360M, Apache 2.0"),
    ("Qwen/Qwen3-0.6B", "0.6B, Apache 2.0, thinks before it answers"),
    ("Qwen/Qwen2.5-1.5B-Instruct", "1.5B, Apache 2.0"),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B, Apache 2.0"),
    ("Qwen/Qwen3-4B", "4B, Apache 2.0, thinks before it answers"),
)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter that can be loaded."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def browse(home: Path, folder: str) -> dict[str, Any]:
    """What lies in a folder: {folder, parent, folders: [{name, path, model}], files: [{name, path, bytes}]}.

    folder: a path, from `home` on where it is relative. Paths in the answer are relative where they lie in
    `home`. Hidden entries and files that hold no rows are left out. Raises RecipeError where it is no folder.
    """
    at = (home / Path(folder).expanduser()).resolve()
    if not at.is_dir():
        raise RecipeError(f"{folder or at} is not a folder")
    folders, rows = [], []
    for entry in sorted(islice(at.iterdir(), MOST_READ), key=lambda path: path.name.lower()):
        if entry.name.startswith("."):
            continue
        path = shown_path(home, entry)
        if entry.is_dir():
            folders.append({"name": entry.name, "path": path, "model": is_model(entry)})
        elif entry.name.endswith((*READERS, ".gz")) and entry.is_file():
            rows.append({"name": entry.name, "path": path, "bytes": entry.stat().st_size})
    return {
        "folder": str(at),
        "path": shown_path(home, at),
        "parent": shown_path(home, at.parent) if at.parent != at else None,
        "model": is_model(at),
        "folders": folders[:MOST],
        "files": rows[:MOST],
    }


def shown_path(home: Path, path: Path) -> str:
    """A path as a recipe would name it: short within the studio's folder, whole outside it."""
    if path == home:
        return "."
    if path.is_relative_to(home):
        return str(path.relative_to(home))
    return str(path)


def cached_models() -> list[str]:
    """Names of the hub's models whose files are on this machine already."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE") or hub)
    names = []
    for folder in sorted(hub.glob("models--*--*")):
        if (folder / "snapshots").is_dir():
            names.append(folder.name.removeprefix("models--").replace("--", "/"))
    return names[:MOST]


def nearby_models(home: Path) -> list[str]:
    """Folders of models in the studio's folder and one below."""
    folders = []
    for path in sorted([*home.glob("*"), *home.glob("*/*")]):
        parts = path.relative_to(home).parts
        if "runs" not in parts and not path.name.startswith(".") and path.is_dir() and is_model(path):
            folders.append(str(path.relative_to(home)))
    return folders[:MOST]


def nearby_data(home: Path, limit: int = 60) -> list[str]:
    """Files of rows in the studio's folder and one below."""
    endings = tuple(ending for ending in READERS if ending not in TEXTS)
    paths = []
    for path in sorted([*home.glob("*"), *home.glob("*/*")]):
        parts = path.relative_to(home).parts
        if not path.name.endswith(endings) or not path.is_file():
            continue
        if {"runs", "exports"} & {*parts} or any(part.startswith(".") for part in parts):
            continue
        paths.append(str(path.relative_to(home)))
    return paths[:limit]
