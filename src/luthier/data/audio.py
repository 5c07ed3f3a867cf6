"""Recordings of rows: wherever a row has one (`audio`, `audios`), the canonical row lists them as `audios`,
paths of files.

Read are paths, bytes, {"bytes", "path"} and {"array", "sampling_rate"} as `datasets` has them. What is in
memory becomes files of a cache, as images do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from luthier.data.images import whole
from luthier.methods.formats._base import BadRow
from luthier.storage import audio, images

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a")


def arrays_in_files(raw: Any) -> Any:
    """A raw row in which every {"array", "sampling_rate"} is a file: a second of sound is more numbers than a
    long text has characters. Raises BadRow where it is no recording.
    """
    if not isinstance(raw, dict):
        return raw
    row = raw
    for name, value in raw.items():
        if audio.is_in_memory(value):
            row = {**row, name: {"path": path_of(value, None)}}
    return row


def audio_in_files(row: dict, folder: Path | None) -> dict:
    """A row whose recordings are `audios`, paths of files. A column `audio` that holds words stays. Raises
    BadRow for what is no recording.
    """
    listed, single = row.get("audios"), row.get("audio")
    if isinstance(listed, (list, tuple)):
        return {**row, "audios": [path_of(each, folder) for each in listed if each is not None]}
    if single is None or not is_audio(single, folder):
        return row
    rest = {name: value for name, value in row.items() if name != "audio"}
    return {**rest, "audios": [path_of(single, folder)]}


def is_audio(value: Any, folder: Path | None) -> bool:
    """Is what a column `audio` holds a recording or its path?"""
    if isinstance(value, str):
        if images.is_stored(value):
            return True
        return value.lower().endswith(SUFFIXES) and os.path.isfile(whole(value, folder))
    return isinstance(value, (dict, bytes, bytearray, os.PathLike))


def path_of(value: Any, folder: Path | None) -> str:
    """The path of a recording."""
    if audio.is_in_memory(value):
        try:
            return audio.in_file(value)
        except ValueError as error:
            raise BadRow(f"a recording cannot be read: {error}") from None
    if isinstance(value, dict):
        inner = next((value[key] for key in ("bytes", "path") if value.get(key) is not None), None)
        if inner is None:
            raise BadRow("a recording is an object without array, bytes or path")
        return path_of(inner, folder)
    if isinstance(value, (bytes, bytearray)):
        return images.stored(bytes(value), "audio")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise BadRow(f"a recording is {type(value).__name__}, not a path, bytes or an array with its rate")
    return whole(value.removeprefix("file://"), folder)
