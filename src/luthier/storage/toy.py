"""Toy tasks and models by name, `toy:NAME`, for whatever loads rows and models.

The package luthier.toy stands above them, so they reach it here, by its name.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

PREFIX = "toy:"
OLD_PREFIX = "practice:"  # of version 0.1


def is_toy(name: Any) -> bool:
    """Whether a name is `toy:NAME`, or `practice:NAME` as version 0.1 wrote it."""
    return isinstance(name, str) and name.startswith((PREFIX, OLD_PREFIX))


def toy_name(name: str) -> str:
    """NAME of `toy:NAME`. Warns, once in a process, of the old spelling."""
    if name.startswith(OLD_PREFIX):
        warn_of_old_prefix()
    return name.partition(":")[2]


@cache
def warn_of_old_prefix() -> None:
    warnings.warn(f"`{OLD_PREFIX}NAME` is now written `{PREFIX}NAME`", stacklevel=4)


def toy_package() -> ModuleType:
    """The package luthier.toy: its `models()`, `path(NAME)`, `rows(TASK, split, n, seed)`, `recipe(name)`."""
    return importlib.import_module("luthier.toy")


def current_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a toy task under the names of today: version 0.1 called its column `task` `world`.

    Such a row is known by its id, `TASK/SPLIT/SEED/INDEX`; any other row is returned as it is.
    """
    name = row.get("world")
    if not isinstance(name, str) or not str(row.get("id")).startswith(f"{name}/"):
        return row
    row = dict(row)
    del row["world"]
    inner = row.get("task")
    if inner is not None and "of" not in row:
        return row  # a stage has written a `task` of its own
    if inner is not None:  # of a row of another task in a chat
        row["of"] = {"task": inner, **row["of"]}
    row["task"] = name
    return row


def former_row(row: dict[str, Any]) -> dict[str, Any]:
    """The way back: a row of a toy task as version 0.1 had it."""
    name = row.get("task")
    if not isinstance(name, str) or not str(row.get("id")).startswith(f"{name}/"):
        return row
    row = dict(row)
    row["world"] = row.pop("task")
    of = row.get("of")
    if isinstance(of, dict) and "task" in of:
        row["of"] = {key: value for key, value in of.items() if key != "task"}
        row["task"] = of["task"]
    return row
