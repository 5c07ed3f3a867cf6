"""Rows that cannot be used, with their place and the reason: recorded, counted, written to a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

PIECE = re.compile(r"@\d+$")  # which piece of its row an encoded row is
DETAIL = re.compile(r"\d[\d,.]*|'[^']*'|\([^)]*\)|(?<=the columns )[\w, ]+(?= do not)")


class TooManyBadRows(RecipeError):
    """More rows are bad than max_bad_rows allows; `bad` holds them."""

    def __init__(self, message: str, bad: list[dict]):
        super().__init__(message, "unusable_rows")
        self.bad = bad


def bad_row(where: str, reason: str, raw: Any) -> dict[str, str]:
    """A line of the quarantine file: {"where": "rows.jsonl:17", "reason", "raw": its first characters}."""
    if isinstance(raw, bytes):
        raw = raw[:2000].decode("utf-8", "backslashreplace")
    elif not isinstance(raw, str):
        try:
            raw = json.dumps(raw, ensure_ascii=False, default=repr)
        except (ValueError, TypeError, RecursionError):  # names that are no text, lists in themselves
            raw = plain_repr(raw)
    return {"where": where, "reason": reason, "raw": raw[:500]}


def plain_repr(value: Any) -> str:
    """A value as Python writes it, or at least its type."""
    try:
        return repr(value)
    except Exception as why:  # whatever an object does when it is written
        return f"{type(value).__name__} ({type(why).__name__})"


def count_reasons(bad: Sequence[dict]) -> list[dict[str, Any]]:
    """Why rows cannot be used, the commonest first: {reason, rows: how many, first: the first place}. Reasons
    that differ in numbers, names and values alone count as the first of them. A row of which several pieces
    cannot be used (`rows.jsonl:1@2`) counts once.
    """
    places: dict[str, dict[str, str]] = {}
    reasons: dict[str, str] = {}
    for number, row in enumerate(bad):
        group = DETAIL.sub("?", row["reason"])
        reasons.setdefault(group, row["reason"])
        places.setdefault(group, {}).setdefault(PIECE.sub("", row["where"]) or str(number), row["where"])
    counted = []
    for group, where in places.items():
        counted.append({"reason": reasons[group], "rows": len(where), "first": next(iter(where.values()))})
    return sorted(counted, key=lambda entry: -entry["rows"])


def check_bad_rows(
    bad: list[dict], total: int, label: str, max_bad_rows: float, quarantine: str | Path | None
) -> None:
    """Raise TooManyBadRows where more than `max_bad_rows` of a source's rows are bad, or all of them; the bad
    ones are then written to `quarantine`.
    """
    if len(bad) < total and len(bad) <= max_bad_rows * total:
        return
    if quarantine is not None:
        write_quarantine(bad, quarantine)
    raise TooManyBadRows(too_many(bad, total, label, max_bad_rows, quarantine), bad)


def too_many(
    bad: Sequence[dict], total: int, label: str, max_bad_rows: float, quarantine: str | Path | None
) -> str:
    """The message about too many bad rows: the count, the commonest reasons with their first place, where all
    are.
    """
    reasons = []
    for entry in count_reasons(bad)[:3]:
        rows = "row" if entry["rows"] == 1 else "rows"
        reasons.append(f"{entry['reason']} ({entry['rows']} {rows}, first {entry['first']})")
    message = (
        f"{len(bad):,} of {total:,} rows of {label} are bad, more than max_bad_rows={max_bad_rows:g} allows:"
        f" {'; '.join(reasons)}"
    )
    if quarantine is not None:
        message += f"; all of them are listed in {quarantine}"
    return message


def write_quarantine(bad: Sequence[dict], path: str | Path) -> None:
    """Add bad rows to a jsonl file, each once. The file is replaced whole, so that a kill leaves the old or
    the new.
    """
    path = Path(path)
    if not bad:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, None] = {}
    if path.exists():
        lines |= dict.fromkeys(path.read_text(encoding="utf-8").splitlines())
    for row in bad:
        lines[json.dumps(row)] = None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(f"{line}\n" for line in lines if line), encoding="utf-8")
    os.replace(temporary, path)
