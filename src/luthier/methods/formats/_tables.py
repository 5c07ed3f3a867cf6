"""Rows of tables as text: `age is 40; sex is M`, the question about one column, and rows shown before it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from luthier.clock import Clock
from luthier.methods.formats._base import BadRow, plain
from luthier.registry import Column

FEATURES = Column(
    "features",
    says="rows of a table, as {column: value}",
    example=({"a": "1", "b": "x"}, {"a": "2", "b": "y"}),
)
TARGET = Column("target", says="the column of `features` that is asked about", example=("b",))

MISSING = "unknown"
# read bare: nothing in them that parts columns, and nothing that would be read as a quoted text
BARE = re.compile(r"(?!\s)[^\n\";]+(?<!\s)")


def cell(value: Any, name: str) -> str | None:
    """A table's cell as text, None where it is missing (null, nan or empty). Raises BadRow."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not value.strip():
        return None
    return plain(value, name)


def serialise(row: Mapping[str, Any]) -> str:
    """{column: value} -> `column is value; column is value`.

    What could be read in two ways is quoted as in JSON, so that `parse` gives the same row back, its values
    as text.
    """
    cells = []
    for name, value in row.items():
        value = cell(value, name)
        cells.append(f"{_quoted(name)} is {MISSING if value is None else _quoted(value)}")
    return "; ".join(cells)


def _quoted(text: str) -> str:
    if text != MISSING and " is " not in f" {text} " and BARE.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=False)


def parse(text: str) -> dict[str, str | None]:
    """The row that `serialise` was given, values as text. Raises ValueError where the text is none."""
    row: dict[str, str | None] = {}
    while text:
        name, text = _token(text, " is ")
        value, text = _token(text, "; ")
        row[json.loads(name) if name.startswith('"') else name] = _value(value)
    return row


def _value(text: str) -> str | None:
    if text.startswith('"'):
        return json.loads(text)
    return None if text == MISSING else text


def _token(text: str, end: str) -> tuple[str, str]:
    """What comes before an end, and what after it; a quoted text as it stands."""
    if text.startswith('"'):
        _, length = json.JSONDecoder().raw_decode(text)
        token, rest = text[:length], text[length:]
        if rest and not rest.startswith(end):
            raise ValueError(f"after {token} comes {rest[:20]!r}, not {end!r}")
        rest = rest.removeprefix(end)
    else:
        token, separator, rest = text.partition(end)
        if end == " is " and not separator:
            raise ValueError(f"{text[:40]!r} is no column with a value")
    return token, rest


def question(
    row: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = (), anonymous: bool = False
) -> str:
    """The text in which a row's target is asked about; the answer is its value.

    row, others: rows with `features` and `target`; those of `others` come first, with their answers.
    anonymous: columns are called c1, c2, ... and y, and neither the table nor its columns are described.
    """
    target, names = row["target"], {name: name for name in row["features"]}
    lines = []
    if anonymous:
        inputs = [name for name in names if name != target]
        names = {name: f"c{k}" for k, name in enumerate(inputs, 1)} | {target: "y"}
    else:
        if row.get("background"):
            lines.append(str(row["background"]))
        for name, meaning in (row.get("meanings") or {}).items():
            lines.append(f"{name}: {meaning}")
    for other in (*others, row):
        inputs = {names[name]: value for name, value in other["features"].items() if name != target}
        lines.append(f"{serialise(inputs)}. What is {names[target]}?")
        if other is not row:
            lines.append(f"Answer: {cell(other['features'][target], target)}")
    return "\n".join([*lines, "Answer:"])


def answer(row: Mapping[str, Any]) -> str:
    """What a row's question is answered with."""
    value = cell(row["features"].get(row["target"]), row["target"])
    if value is None:
        raise BadRow(f"{row['target']}, the column that is asked about, is missing")
    return value


def same_question(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Places of rows with the same columns, target and background: rows of one table, asked alike."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        key = (frozenset(row["features"]), row["target"], str(row.get("background")))
        groups[key].append(place)
    return list(groups.values())


def draw(places: Sequence[int], own: int, n: int, clock: Clock, *name: str) -> list[int]:
    """At most n of the places, without `own`, in an order that follows from (seed, step, name)."""
    others = [place for place in places if place != own]
    order = torch.randperm(len(others), generator=clock.rng(*name))[:n]
    return [others[k] for k in order.tolist()]
