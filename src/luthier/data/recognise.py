"""Which format rows have, by their columns: the formats are in methods/formats, a file each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, Format
from luthier.registry import build, classes

SAMPLE = 32  # rows of equal columns that are tried with each format
LISTED = 20  # columns that a message lists
# columns of tasks that no format reads -> what helps
OTHER_TASKS = (
    (
        {"anchor", "positive", "negative"},
        "anchor, positive and negative are rows for embedding models, which are not trained here; as"
        " preferences they are read with columns: {prompt: anchor, chosen: positive, rejected: negative}",
    ),
)


@cache
def every_format() -> list[type[Format]]:
    """The class of every format."""
    return classes("format")


def matching_formats(columns: Iterable[str]) -> list[type[Format]]:
    """The formats that can read rows with these columns, the most specific first."""
    columns = set(columns)
    matches = [cls for cls in every_format() if cls.matches(columns)]
    return sorted(matches, key=lambda cls: specificity(cls, columns), reverse=True)


def specificity(cls: type[Format], columns: Iterable[str]) -> tuple[int, bool]:
    """More matched columns say more; of equally many, those that only one format has."""
    return cls.fit(columns), not cls.generic


def recognise_format(rows: Sequence[dict], label: str) -> Format:
    """The format of most rows. Raises RecipeError where none or several fit."""
    groups: dict[frozenset[str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[frozenset(row)].append(row)
    chosen: dict[frozenset[str], tuple[str, ...]] = {}
    votes: Counter[tuple[str, ...]] = Counter()
    for columns, group in groups.items():
        chosen[columns] = best_formats(columns, group[:SAMPLE])
        votes[chosen[columns]] += len(group)
    ranked = [candidates for candidates, _ in votes.most_common() if candidates]
    ranked.append(())  # where no format fits any row
    winner = ranked[0]
    agreeing = [columns for columns in groups if chosen[columns] == winner]
    columns = max(agreeing, key=lambda columns: len(groups[columns]))
    if not winner:
        raise RecipeError(no_format(columns, label))
    first, *others = winner
    if others:
        raise RecipeError(
            f"{label}: the columns {', '.join(sorted(columns))} match more than one format"
            f" ({' and '.join(winner)}); choose one, such as format: {first}"
        )
    return build("format", first)


def best_formats(columns: frozenset[str], sample: Sequence[dict]) -> tuple[str, ...]:
    """The name of the most specific format that reads at least half of a sample of rows; several names where
    they are equally specific, none where no format fits.
    """
    matches = matching_formats(columns)
    able = []
    for cls in matches:
        reader = cls()
        readable = sum(reader.reads(row) for row in sample)
        if readable * 2 >= len(sample):
            able.append(cls)
    able = able or matches
    return tuple(cls.name for cls in able if specificity(cls, columns) == specificity(able[0], columns))


def no_format(columns: Iterable[str], label: str) -> str:
    """The message where no format fits: the columns there are, what the nearest formats need, how to map
    names.
    """
    columns = sorted(columns)
    for names, advice in OTHER_TASKS:
        if names <= {*columns}:
            return f"{label}: {advice}"
    needed = nearest_formats(set(columns))[:4]
    nearest = "; ".join(f"{name} needs {' + '.join(required)}" for name, required in needed)
    listed = ", ".join(columns[:LISTED]) or "(none)"
    if len(columns) > LISTED:
        listed += f" and {len(columns) - LISTED} more"
    example = columns[0] if columns else "question"
    return (
        f"{label}: no format matches the columns {listed}. Nearest: {nearest}. Rename columns"
        f" with columns: {{prompt: {example}, completion: ...}} (left: name in the format,"
        " right: name in the file)"
    )


def nearest_formats(columns: set[str]) -> list[tuple[str, list[str]]]:
    """(format, the columns it needs), those first that share the largest part of them; where none shares any,
    the plainest.
    """
    ranked = []
    for cls in every_format():
        for shape in cls.columns:
            required = shape.split()
            shared = len(columns.intersection(required)) / len(required)
            plain = cls.provides == {"completions"}
            ranked.append(((-shared, not plain, len(required)), cls.name, required))
    ranked.sort(key=lambda entry: entry[0])
    nearest: dict[str, list[str]] = {}
    for _, name, required in ranked:
        nearest.setdefault(name, required)
    return list(nearest.items())


def format_of_row(row: dict, file_format: Format, fixed: bool) -> Format:
    """The format that reads a row: the file's, or one that gives the same kind of row (a mixed file).

    A file of Alpaca rows may hold some messages: both give completions. A preference pair among them is a bad
    row, and so is any other format where the user named one (`fixed`). Raises BadRow.
    """
    if file_format.matches(row):
        return file_format
    if not fixed:
        for cls in matching_formats(row):
            if cls.provides == file_format.provides:
                return cls(chat=file_format.chat)
    columns = ", ".join(sorted(row)) or "(none)"
    raise BadRow(f"the columns {columns[:200]} do not match the file's format, {file_format.name}")
