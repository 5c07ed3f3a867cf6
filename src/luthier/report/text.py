"""Text that pages and terminals share: marked rows, control characters, titles, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# around supervised tokens in rows shown to people: private characters, so no text has them
MARKS = ("\ue000", "\ue001")
ROWS = 3  # rows that are shown
# control characters -> what is shown in their place; a line break and a tab stay
CONTROLS = {
    **{c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"},
    0x7F: "␡",
    **dict.fromkeys(range(0x80, 0xA0), "�"),
}


def render_rows(roles: Any, rows: Sequence[dict]) -> list[str]:
    """The first rows as the model reads them, supervised tokens between MARKS."""
    return [roles.renderer.decode_marked(row, MARKS) for row in rows[:ROWS]]


def visible(text: str) -> str:
    """Text that models and rows may have written: its control characters must not reach the terminal."""
    return text.translate(CONTROLS)


def cut(text: str, limit: int) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"


def plain(value: Any) -> str:
    """A value in a table cell, as YAML users write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return ""
    return str(value)


def run_title(recipe: Any) -> str:
    """What a run is called: 'toy:lm, lora, sft'."""
    parts = [str(recipe.model), _method_names(recipe.tuner), _method_names(recipe.objective)]
    return ", ".join(filter(None, parts))


def _method_names(value: Any) -> str:
    """'dpo + sft' of a method as a recipe has it: a name, a mapping, or a list of them."""
    if isinstance(value, (list, tuple)):
        return " + ".join(map(_method_names, value))
    if isinstance(value, Mapping):
        return str(value.get("name", ""))
    if value is None:
        return ""
    return str(value)


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """(package, version) of what computed a result."""
    packages = [("python", platform.python_version())]
    for name in ("luthier", "torch", "transformers", "peft", "accelerate"):
        try:
            packages.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(packages)
