"""Rows that are given in Python, by whatever library holds them, as lists of plain rows.

A recipe is plain data, read and copied many times, so what can be read only once (a generator) is read here.
Tables give every object every key; what is null in one of theirs is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from typing import Any

from luthier.methods.formats._base import without_nulls

HELD_OUT = ("validation", "test")  # splits that are not trained on, the one first that is for choosing
MAX_DEPTH = 64  # of lists and objects in a row


def rows_in_memory(value: Any, limit: int | None = None) -> list | dict[str, list] | None:
    """The rows of a `datasets` Dataset or IterableDataset, a DataFrame of pandas or polars, an Arrow table, a
    torch Dataset, a generator or any other iterable; {split: rows} of a DatasetDict. None where the value is
    none of these: text, a path, a list, a mapping.
    """
    library = type(value).__module__.partition(".")[0]
    if library == "datasets" and isinstance(value, Mapping):
        return {str(split): list(islice(dataset_rows(rows), limit)) for split, rows in value.items()}
    if isinstance(value, (str, bytes, list, tuple, Mapping, Set)):
        return None
    if library == "datasets":
        return list(islice(dataset_rows(value), limit))
    if library == "pandas" and hasattr(value, "to_dict"):
        return frame_rows(value.head(limit) if limit else value)
    if hasattr(value, "to_dicts"):  # polars
        return without_nulls(value.to_dicts()[:limit])
    if hasattr(value, "to_pylist"):  # Arrow
        return without_nulls(value.to_pylist()[:limit])
    if isinstance(value, Iterable):
        return list(islice(value, limit))
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return [value[i] for i in range(min(len(value), limit or len(value)))]
    return None


def own_splits(value: Any) -> tuple[list, list] | None:
    """(training rows, held-out rows) of {"train": [...], "test": [...]}; or None."""
    if not isinstance(value, dict) or not isinstance(value.get("train"), list):
        return None
    for split in HELD_OUT:
        if isinstance(value.get(split), list) and all(isinstance(rows, list) for rows in value.values()):
            return value["train"], value[split]
    return None


def dataset_rows(dataset: Any) -> Iterator[dict]:
    """The rows of a `datasets` Dataset; a class label gets its name beside it (`label_name`)."""
    feature = (dataset.features or {}).get("label")
    class_names = getattr(feature, "names", None)
    for row in dataset:
        value = row.get("label")
        if class_names is not None and isinstance(value, int) and 0 <= value < len(class_names):
            row = {**row, "label_name": class_names[value]}
        yield without_nulls(row)


def frame_rows(frame: Any) -> list[dict]:
    """The rows of a pandas DataFrame, names as text; what is missing in it is None."""
    names = [str(name) for name in frame.columns]
    rows = []
    for cells in frame.itertuples(index=False, name=None):
        row = {}
        for name, cell in zip(names, cells, strict=True):
            missing = type(cell).__name__ in ("NAType", "NaTType") or (
                isinstance(cell, float) and cell != cell
            )
            row[name] = None if missing else cell
        rows.append(row)
    return rows


def plain_value(value: Any, depth: int = 0) -> Any:
    """A cell as JSON has it: scalars and arrays of numpy or torch as numbers and lists, tuples as lists; what
    is nothing of these as it is.
    """
    if value is None or isinstance(value, (str, bool)) or type(value) in (int, float):
        return value
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        return {key: plain_value(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner, depth + 1) for inner in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return plain_value(value.tolist(), depth + 1)
    return value
