"""Where rows come from: a file, a folder, a toy task, a data set of the hub, rows in memory, or an entry of
another tool's data-set list.

Files are read in files.py and other tools' lists in foreign.py; here is what a source is, and the raw rows it
holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.data import folders
from luthier.data.files import READERS, RawRows, check_object, choose_split, read_file, rows_of_columns
from luthier.data.folders import DATASET_INFO
from luthier.data.foreign import PromptLayout, from_axolotl, from_dataset_info
from luthier.data.lines import file_kind
from luthier.data.recognise import matching_formats
from luthier.errors import RecipeError, shortened
from luthier.recipe.in_memory import HELD_OUT, dataset_rows, rows_in_memory
from luthier.registry import did_you_mean, format_errors
from luthier.storage.toy import is_toy, toy_name, toy_package

SOURCE_KEYS = {"path", "file_name", "hf_hub_url"}


class Source(BaseModel):
    """One place that rows come from."""

    model_config = ConfigDict(extra="forbid")

    # a file, a folder, toy:TASK/SPLIT, a hub name, or the rows themselves, perhaps {split: rows}
    path: str | list | dict[str, list]
    split: str | None = None  # a split of a hub data set, a saved data set, a folder or a toy task (train)
    # the configuration of a hub data set, a subfolder of a folder, or the entry of a dataset_info.json
    name: str | None = None
    # a format's name or {name, settings}; recognised by columns where there is none
    format: str | dict | None = None
    columns: dict[str, str] = {}  # our name of a column: the file's name of it
    tags: dict[str, str] = {}  # the file's names of roles and keys in messages: ours
    prompt_layout: PromptLayout | None = None  # how a prompt is written of instruction and input (axolotl)
    limit: int | None = Field(default=None, ge=1, le=2**62)  # rows to read at most
    # characters of the longest row (default: a million); longer texts are cut into pieces
    max_row_chars: int | None = Field(default=None, ge=1)
    n: int = Field(default=1000, ge=1, le=1_000_000)  # rows to generate of a toy task
    seed: int = 0  # of a toy task
    source: str | None = None  # the value of the column `source` of its rows, for objective by_source

    @property
    def label(self) -> str:
        """How messages call it."""
        if isinstance(self.path, str):
            return self.path
        return "the list of rows"


# ------------------------------------------------------------------------------------------ naming a source


def resolve_source(value: Any) -> Source:
    """Anything that names a source -> Source. Raises RecipeError where it makes no sense."""
    if isinstance(value, Source):
        return value
    if isinstance(value, (str, Path)):
        path, _, name = str(value).rpartition(":")
        if path.endswith(DATASET_INFO):
            return dataset_info_source(path, name)
        if name.endswith(DATASET_INFO):
            return dataset_info_source(str(value), None)
        return Source(path=str(value))
    if isinstance(value, (list, tuple)):
        return Source(path=list(value))
    rows = rows_in_memory(value)
    if rows is not None:
        return Source(path=rows)
    if not isinstance(value, dict):
        raise RecipeError(f"data: expected a path, a name, rows or {{path: ...}}, not {shortened(value)}")
    if "path" not in value and value and all(isinstance(column, list) for column in value.values()):
        return table_or_splits(value)
    spec = from_axolotl(value)
    rows = rows_in_memory(spec.get("path"), spec.get("limit"))
    if rows is not None:
        spec["path"] = rows
    if str(spec.get("path", "")).endswith(DATASET_INFO):
        entry = dataset_info_source(spec.pop("path"), spec.pop("name", None))
        return entry.model_copy(update=spec)
    unknown = sorted(spec.keys() - Source.model_fields)
    if unknown:
        suggestion = did_you_mean(unknown[0], Source.model_fields)
        raise RecipeError(f"data: no setting is named '{unknown[0]}'{suggestion}")
    return check_source(spec, "data")


def table_or_splits(value: dict[str, list]) -> Source:
    """Rows given as {split: rows}, or as a table: {column: cells}."""
    if all(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in value.values()):
        if not matching_formats(value):
            return Source(path=value)
    if len(set(map(len, value.values()))) > 1:
        raise RecipeError("data: the columns of a table must be equally long")
    return Source(path=list(rows_of_columns(value)))


def dataset_info_source(path: str, name: str | None) -> Source:
    """An entry of LLaMA-Factory's dataset_info.json."""
    file = existing_file(Path(path))
    return check_source(from_dataset_info(file, name), f"{file}: {name}" if name else str(file))


def check_source(spec: dict, label: str) -> Source:
    """A Source of checked values; a value of None counts as not there."""
    values = {}
    for key, value in spec.items():
        if value is not None:
            values[key] = str(value) if isinstance(value, Path) else value
    try:
        return Source.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{label}: {format_errors(error)}") from None


def is_row(value: Any) -> bool:
    """Whether a dict is a row rather than a source: sources have a path and no columns of a format."""
    if not isinstance(value, dict):
        return False
    return not (SOURCE_KEYS & value.keys()) or bool(matching_formats(value))


def existing_file(path: Path) -> Path:
    """A path that exists. Raises RecipeError, with the nearest name, where it does not."""
    if existing_path(str(path)) is None:
        raise RecipeError(missing(str(path)))
    return path


def missing(name: str) -> str:
    """The message about a file that does not exist, with the nearest name."""
    path = Path(name)
    if existing_path(str(path.parent)) is None:
        return (
            f"folder {shortened(str(path.parent))} does not exist, so {shortened(path.name)} cannot be read"
        )
    siblings = sorted(os.listdir(path.parent.expanduser()))
    return f"file {shortened(name)} does not exist{did_you_mean(path.name, siblings)}"


def expand(source: Source) -> tuple[list[Source], list[str]]:
    """The sources that one stands for, and what is to be known of it: the files of a folder that are read,
    and those that LLaMA-Factory's dataset_info.json beside them says how to read.
    """
    if not isinstance(source.path, str) or is_toy(source.path):
        return [source], []
    path = existing_path(source.path)
    if path is None or is_saved_dataset(path):
        return [source], []
    if path.is_file():
        own = with_entry(source, path, folders.entries_beside(path.parent))
        if own is None:
            return [source], []
        return [own], [f"{path}: its columns are read as its entry in {DATASET_INFO} says"]
    listing = folders.data_files(path)
    chosen = folders.choose_files(listing, path, source.split, source.name)
    entries = folders.entries_beside(path)
    notes = []
    if len(listing) > 1:
        notes.append(folders.describe(listing, chosen, path))
    if not any(file.name in entries for file in chosen):
        return [source], notes
    notes.append(f"{path}: columns are read as {DATASET_INFO} says")
    parts = []
    for file in chosen:
        alone = source.model_copy(update={"path": str(file), "name": None})
        parts.append(with_entry(alone, file, entries) or alone)
    return parts, notes


def with_entry(source: Source, path: Path, entries: dict[str, str]) -> Source | None:
    """A file as its entry of a dataset_info.json says; None where it has none, or the user says more."""
    if path.name not in entries or source.columns or source.tags or source.format:
        return None
    entry = dataset_info_source(str(path.parent / DATASET_INFO), entries[path.name])
    return source.model_copy(update={"columns": entry.columns, "tags": entry.tags})


def held_out_source(source: Source) -> Source | None:
    """The rows that a source brings to be held out: the validation or test files of a folder, or such splits;
    None where it has none, or where a split is named.
    """
    if source.split is not None:
        return None
    splits: list[str] = []
    if isinstance(source.path, dict):
        splits = list(source.path)
    elif isinstance(source.path, str) and not is_toy(source.path):
        path = existing_path(source.path)
        if path is None:
            splits = hub_splits(source)
        elif not path.is_dir():
            return None
        elif is_saved_dataset(path):
            splits = saved_splits(path)
        elif split := folders.own_held_out(path, source.name):
            splits = ["train", split]
    for split in HELD_OUT:
        if split in splits and "train" in splits:
            return source.model_copy(update={"split": split})
    return None


def hub_splits(source: Source) -> list[str]:
    """The splits of a data set of the hub; none where they cannot be read: reading its rows then says why."""
    path = str(source.path)
    if file_kind(Path(path)) in READERS or path.startswith((".", "/", "~")) or len(path) > 200:
        return []
    import datasets

    try:
        return datasets.get_dataset_split_names(path, source.name)
    except Exception:  # no network, no such data set, several configurations: whatever the library raises
        return []


def existing_path(text: str) -> Path | None:
    """The file or folder of this name; None where there is none, or where it cannot be a name."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_splits(path: Path) -> list[str]:
    """The splits of a folder written by `save_to_disk`."""
    return sorted(split.name for split in path.iterdir() if split.is_dir())


# ---------------------------------------------------------------------------------------------- raw rows


def read_source(source: Source, max_row_chars: int) -> RawRows:
    """(place, raw row) of a source, in order."""
    path = source.path
    if isinstance(path, dict):
        split = choose_split(path, source.split, "the data set")
        return ((f"{split}:{i}", check_object(row)) for i, row in enumerate(path[split], 1))
    if isinstance(path, list):
        return ((f"rows:{i}", check_object(row)) for i, row in enumerate(path, 1))
    if is_toy(path):
        return read_toy(source)
    if "\0" in path:
        raise RecipeError("data: a path cannot contain a NUL byte")
    place = existing_path(path)
    if place is not None and place.is_dir():
        return read_folder(place, source, max_row_chars)
    if place is not None:
        return read_file(place, max_row_chars, source.split)
    if file_kind(Path(path)) in READERS or path.startswith((".", "/", "~")) or len(path) > 200:
        raise RecipeError(missing(path))
    return read_hub(source)


def read_toy(source: Source) -> RawRows:
    """Rows generated for a toy task."""
    task, _, split = toy_name(str(source.path)).partition("/")
    split = source.split or split or "train"
    try:
        rows = toy_package().rows(task, split, min(source.n, source.limit or source.n), source.seed)
    except (ValueError, KeyError) as why:
        raise RecipeError(f"{source.path}: {why}") from None
    return ((f"{task}/{split}:{i}", row) for i, row in enumerate(rows, 1))


def read_folder(folder: Path, source: Source, max_row_chars: int) -> RawRows:
    """A folder that `datasets` saved, or one that holds data files (read in the order of their names)."""
    if is_saved_dataset(folder):
        import datasets

        return read_dataset(datasets.load_from_disk(str(folder)), source, folder.name)
    listing = folders.data_files(folder)
    if not listing:
        raise RecipeError(
            f"folder {folder} has no data: no {', '.join(sorted(READERS))} file and no data set"
            " from save_to_disk"
        )
    files = folders.choose_files(listing, folder, source.split, source.name)
    return (entry for path in files for entry in read_file(path, max_row_chars, source.split))


def read_hub(source: Source) -> RawRows:
    """A data set of the hub, or of its cache when offline. Code that comes with a data set is never run."""
    import datasets

    path = str(source.path)
    options: dict[str, Any] = {} if source.split is None else {"split": source.split}
    try:
        dataset = datasets.load_dataset(path, source.name, **options)
    except Exception as why:  # anything from a network error to a wrong split; each says what is wrong
        reason = str(why).strip().split("\n", 1)[0]
        near = did_you_mean(path, sorted(os.listdir()))
        raise RecipeError(
            f"'{path}' is neither a file{near} nor a data set that can be loaded: {reason}"
        ) from None
    return read_dataset(dataset, source, path)


def read_dataset(dataset: Any, source: Source, label: str) -> RawRows:
    """Rows of a Dataset, or of one split of a DatasetDict."""
    if hasattr(dataset, "keys"):
        dataset = dataset[choose_split(dataset, source.split, label)]
    for i, row in enumerate(dataset_rows(dataset), 1):
        yield f"{label}:{i}", row
