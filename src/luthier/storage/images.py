"""Images in memory as files of a cache, named by their content: rows hold paths, so that a recipe, a run
folder and a page are small, and the same image is one file.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from luthier.storage import files

MAX_BYTES = 200 << 20  # of an image's file
MAX_PIXELS = 100_000_000  # of an image: beyond this a small file may fill the memory


def is_in_memory(value: Any) -> bool:
    """Is a value an image of PIL, or {"bytes": ...} as `datasets` has it?"""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), (bytes, bytearray))
    return type(value).__module__.startswith("PIL.") and hasattr(value, "save")


def in_file(value: Any) -> str:
    """The path of the file that holds such an image, written where it is not there. Raises DiskError."""
    if isinstance(value, dict):
        return stored(bytes(value["bytes"]))
    content = io.BytesIO()
    value.save(content, "PNG")
    return stored(content.getvalue())


def stored(content: bytes, kind: str = "images") -> str:
    """The path of a file with this content, written where it is not there. kind: of media, the folder's name.
    Raises DiskError.
    """
    path = cache() / kind / hashlib.blake2b(content, digest_size=16).hexdigest()
    if not path.is_file():
        files.write_bytes(path, content)
    return str(path)


def is_stored(path: str) -> bool:
    """Is a path one that `stored` gave? Such files have no suffix."""
    return os.path.isabs(path) and Path(path).parent.parent == cache() and os.path.isfile(path)


def cache() -> Path:
    """Where files of media are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
