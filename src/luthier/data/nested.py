"""Rows that lie inside others: under one column ({"data": {"messages": [...]}}, a batch file's `body`), or as
a list ({"paragraphs": [{"context": ..., "qas": [...]}]}, as SQuAD's files have them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from luthier.data.recognise import matching_formats

DEPTH = 3  # columns in columns that are looked into
SAMPLE = 100  # rows that are looked at for where the rows lie

RawRow = tuple[str, dict]  # (place, row)


def unnested(raw_rows: Sequence[RawRow], label: str) -> tuple[Sequence[RawRow], list[str]]:
    """The rows inside the rows, and a sentence that says so; the rows as they are where a format reads them,
    or where none reads what is inside. An inner row has the columns of those around it, too.
    """
    sample = [row for _, row in raw_rows[:SAMPLE]]
    if any(map(matching_formats, sample)):
        return raw_rows, []
    path = next(filter(None, map(path_to_rows, sample)), ())
    if not path:
        return raw_rows, []
    inner = [pair for where, row in raw_rows for pair in rows_at(path, row, where)]
    return inner, [f"{label}: the rows are what lies under {'.'.join(path)}"]


def path_to_rows(row: dict) -> tuple[str, ...]:
    """The names of the columns, from outside to inside, under which a format's columns lie all together; the
    nearest first, none where there are none.
    """
    level: list[tuple[tuple[str, ...], dict]] = [((), row)]
    for _ in range(DEPTH):
        deeper = []
        for path, outer in level:
            for name, value in outer.items():
                inner = first_object(value)
                if inner is None:
                    continue
                if is_row(inner, alone=len(outer) == 1):
                    return (*path, name)
                deeper.append(((*path, name), inner))
        level = deeper
    return ()


def is_row(value: dict, alone: bool) -> bool:
    """Whether an object is a row. A text or a prompt in a column beside others may be about the row, and is
    none; alone it is.
    """
    formats = matching_formats(value)
    return bool(formats) and (alone or not formats[0].generic)


def first_object(value: Any) -> dict | None:
    """An object, or the first of a list of them."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, dict) else None


def rows_at(path: Sequence[str], row: dict, where: str) -> Iterator[RawRow]:
    """The rows under a path, each with its place. What has nothing there stays as it is, so that it is set
    aside with its columns.
    """
    if not path:
        yield where, row
        return
    name, *rest = path
    inner = row.get(name)
    if isinstance(inner, dict):
        yield from rows_at(rest, beside(row, name, inner), f"{where}.{name}")
        return
    if not isinstance(inner, list) or not inner:
        yield where, row
        return
    for i, entry in enumerate(inner):
        place = f"{where}.{name}[{i}]"
        if isinstance(entry, dict):
            yield from rows_at(rest, beside(row, name, entry), place)
        else:
            yield place, {**row, name: entry}


def beside(row: dict, name: str, inner: dict) -> dict:
    """An inner row with the columns of the row that it lies in, where it has none of these names."""
    outer = {key: value for key, value in row.items() if key != name}
    return {**outer, **inner}
