"""A recipe that is being made from another tool's configuration, and what became of each of its keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import RecipeError, quoted

Outcome = Literal["mapped", "changed", "dropped", "unknown"]


@dataclass(frozen=True)
class Note:
    """What became of one key of the other tool."""

    key: str
    outcome: Outcome
    place: str = ""  # key of the recipe that has it now
    why: str = ""  # of what was changed or dropped; for unknown keys, what may have been meant


@dataclass
class Draft:
    """A recipe in the making. Keys that are None count as not there, as in all four tools."""

    tool: str
    values: Mapping[str, Any]  # as written
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the tool, where luthier's differ
    devices: int = 1  # processes of the run that the configuration was written for
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key: as written, else the tool's default."""
        value = self.values.get(key)
        if value is None:
            value = self.defaults.get(key)
        if value is None:
            return default
        return value

    def put(self, place: str, value: Any, *keys: str) -> None:
        """Set a key of the recipe, perhaps a setting such as tuner.r. keys: that it comes from."""
        *outer, last = place.split(".")
        inner = self.recipe
        for name in outer:
            if not isinstance(inner.get(name), dict):
                inner[name] = {"name": inner[name]} if name in inner else {}
            inner = inner[name]
        inner[last] = value
        for key in keys:
            self.note(key, "mapped", place)

    def change(self, key: str, place: str, why: str) -> None:
        """A key of which the recipe has something near."""
        self.note(key, "changed", place, why)

    def drop(self, key: str, why: str) -> None:
        """A key that a recipe has no place for, or needs none."""
        self.note(key, "dropped", "", why)

    def note(self, key: str, outcome: Outcome, place: str = "", why: str = "") -> None:
        """What became of a key, where it was written; what is noted first stays."""
        if self.values.get(key) is not None and key not in self.noted():
            self.notes.append(Note(key, outcome, place, why))

    def noted(self) -> set[str]:
        """The keys of which something became."""
        return {note.key for note in self.notes}


@dataclass(frozen=True)
class To:
    """The key of a recipe that a key becomes, and how its value is converted."""

    place: str
    convert: Callable[[Any], Any]


@dataclass(frozen=True)
class Drop:
    """Why a recipe has no place for a key."""

    why: str


# what becomes of a key: its place in the recipe; why it is dropped; or who reads it, together with others
Rule = str | To | Drop | Callable[[Draft], None]


def follow(table: Mapping[str, Rule], draft: Draft) -> None:
    """Fill a draft by a table. Functions of the table are called once each, in its order, also where none of
    their keys is written, since a tool's default may say something.
    """
    readers = []
    for key, rule in table.items():
        if callable(rule):
            if rule not in readers:
                readers.append(rule)
                rule(draft)
        elif isinstance(rule, Drop):
            draft.drop(key, rule.why)
        elif draft.get(key) is not None:
            value = draft.get(key)
            if isinstance(rule, To):
                value, rule = rule.convert(value), rule.place
            draft.put(rule, value, key)
    for key in draft.values:
        if key in table:
            draft.drop(key, "it has no effect beside the other keys")


def as_list(value: Any) -> list[Any]:
    """A value as a list: texts such as "a, b" at their commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if value is None else [value]


def number(value: Any) -> Any:
    """YAML reads 1e-4 as text; a number is meant. Raises RecipeError where it is none."""
    if isinstance(value, bool | int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{value!r} stands where a number is expected") from None


def whole(value: Any) -> int:
    """A count, written as a number or as text. Raises RecipeError where it is none."""
    try:
        return int(number(value))
    except (ValueError, OverflowError):  # not a number, or endless
        raise RecipeError(f"{value!r} stands where a whole number is expected") from None


def as_object(value: Any) -> dict[str, Any]:
    """A mapping, also written as JSON text; empty where there is none. Raises RecipeError for others."""
    parsed = value or {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, Mapping):
        raise RecipeError(f"{quoted(value)} stands where `key: value` or a JSON object is expected")
    return {str(key): inner for key, inner in parsed.items()}


def is_on(value: Any) -> bool:
    """Whether a switch is on: true, or "true" as command lines have it."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "1", "on")
    return bool(value)
