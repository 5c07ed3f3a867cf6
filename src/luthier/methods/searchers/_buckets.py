"""Configurations as text of small whole numbers: each range is cut into equal buckets (of its logarithm where
it is searched by that), and a setting is written as the number of its bucket; a choice is written as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.methods.searchers._base import Dim, Space

PAIR = re.compile(r"([^\s=,;]+)\s*=\s*([^\s,;]+)")


def bucket(dim: Dim, value: Any, buckets: int) -> str:
    """The bucket of a value, 0 to buckets - 1, or the choice itself, as text."""
    if dim.choices:
        return str(value)
    return str(min(int(dim.of(value) * buckets), buckets - 1))


def value_of(dim: Dim, text: str, buckets: int) -> Any:
    """The middle of a bucket, or the choice. Raises ValueError for text that is neither."""
    if dim.choices:
        for choice in dim.choices:
            if str(choice) == text:
                return choice
        raise ValueError(f"{dim.name} has no choice {text!r}")
    number = int(text)
    if not 0 <= number < buckets:
        raise ValueError(f"{dim.name}: {number} is no bucket of {buckets}")
    return dim.at((number + 0.5) / buckets)


def write(space: Space, point: Mapping[str, Any], buckets: int) -> str:
    """A configuration as `name=bucket, name=bucket`, in the space's order."""
    parts = []
    for dim in space.dims:
        if dim.name in point:
            parts.append(f"{dim.name}={bucket(dim, point[dim.name], buckets)}")
    return ", ".join(parts)


def read(space: Space, text: str, buckets: int) -> dict[str, Any] | None:
    """The way back. What is not named, or is in no bucket, stands at its default; None where nothing is
    readable.
    """
    dims = {dim.name: dim for dim in space.dims}
    point = {}
    for name, entry in PAIR.findall(text):
        if name in dims and name not in point:
            try:
                point[name] = value_of(dims[name], entry, buckets)
            except ValueError:
                continue
    return space.active(point) if point else None


def question(space: Space, workload: str, buckets: int) -> str:
    """The prompt: the workload, then each setting with what it may be."""
    lines = []
    for dim in space.dims:
        if dim.choices:
            allowed = " or ".join(str(choice) for choice in dim.choices)
        else:
            allowed = f"{dim.low:g} to {dim.high:g}{' by its logarithm' if dim.log else ''}"
        lines.append(f"{dim.name}: {allowed}")
    settings = "\n".join(lines)
    return f"{workload.strip()}\nSettings, in buckets 0 to {buckets - 1} of their ranges:\n{settings}\nBest: "
