"""Code of the user's own that a recipe names as `file.py:name`; it is trusted and runs in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError


def split_path(path: str, what: str = "function") -> tuple[str, str]:
    """`file.py:name` -> file and name. Raises ValueError where it is no such path, or the file is missing."""
    file, _, name = path.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"path: '{path}' is not file.py:{what}")
    if not Path(file).expanduser().is_file():
        raise ValueError(f"path: there is no file {file}")
    return file, name


@cache
def load_named(file: str, name: str, who: str) -> Callable[..., Any]:
    """A function or class of a file, imported once. who: the method that asks, for errors. Raises RecipeError
    where it is not there.
    """
    path = Path(file).expanduser().resolve()
    described = importlib.util.spec_from_file_location(f"luthier_user_{path.stem}", path)
    if described is None or described.loader is None:
        raise RecipeError(f"{who}: {file} cannot be imported")
    module = importlib.util.module_from_spec(described)
    try:
        described.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{who}: {file} cannot be imported: {error}") from error
    value = getattr(module, name, None)
    if not callable(value):
        raise RecipeError(f"{who}: {file} has no function or class '{name}'")
    return value
