"""Where rows come from: a file, a folder, a toy task, a data set of the hub, rows in memory, or an entry of
another tool's data-set list.

Files are read in files.py and other tools' lists in foreign.py; here is what a source is, and the raw rows it
holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.data.files import READERS, RawRows, check_object, file_kind, read_file
from luthier.data.foreign import from_axolotl, from_dataset_info
from luthier.data.recognise import matching_formats
from luthier.errors import RecipeError
from luthier.registry import did_you_mean, format_errors
from luthier.storage.toy import is_toy, toy_name, toy_package

DATASET_INFO = "dataset_info.json"
SOURCE_KEYS = {"path", "file_name", "hf_hub_url"}


class Source(BaseModel):
    """One place that rows come from."""

    model_config = ConfigDict(extra="forbid")

    path: str | list  # a file, a folder, toy:TASK/SPLIT, a hub name, or the rows themselves
    split: str | None = None  # a split of a hub data set, a saved data set or a toy task (train)
    name: str | None = None  # the configuration of a hub data set, or the entry of a dataset_info.json
    # a format's name or {name, settings}; recognised by columns where there is none
    format: str | dict | None = None
    columns: dict[str, str] = {}  # our name of a column: the file's name of it
    tags: dict[str, str] = {}  # the file's names of roles and keys in messages: ours
    limit: int | None = Field(default=None, ge=1)  # rows to read at most
    n: int = Field(default=1000, ge=1)  # rows to generate of a toy task
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
    if not isinstance(value, dict):
        raise RecipeError(f"data: expected a path, a name, rows or {{path: ...}}, not {value!r}")
    spec = from_axolotl(value)
    if str(spec.get("path", "")).endswith(DATASET_INFO):
        entry = dataset_info_source(spec.pop("path"), spec.pop("name", None))
        return entry.model_copy(update=spec)
    unknown = sorted(spec.keys() - Source.model_fields)
    if unknown:
        suggestion = did_you_mean(unknown[0], Source.model_fields)
        raise RecipeError(f"data: no setting is named '{unknown[0]}'{suggestion}")
    return check_source(spec, "data")


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
    if path.exists():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise RecipeError(f"folder {folder} does not exist, so {path.name} cannot be read")
    siblings = sorted(sibling.name for sibling in folder.iterdir())
    raise RecipeError(f"file {path} does not exist{did_you_mean(path.name, siblings)}")


# ---------------------------------------------------------------------------------------------- raw rows


def read_source(source: Source, max_row_chars: int) -> RawRows:
    """(place, raw row) of a source, in order."""
    if not isinstance(source.path, str):
        return ((f"rows:{i}", check_object(row)) for i, row in enumerate(source.path, 1))
    if is_toy(source.path):
        return read_toy(source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return read_folder(path, source, max_row_chars)
    if path.is_file() or file_kind(path) in READERS or source.path.startswith((".", "/", "~")):
        return read_file(existing_file(path), max_row_chars)
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
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        return read_dataset(datasets.load_from_disk(str(folder)), source, folder.name)
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and file_kind(path) in READERS and path.name != DATASET_INFO:
            files.append(path)
    if not files:
        raise RecipeError(
            f"folder {folder} has no data: no {', '.join(sorted(READERS))} file and no data set"
            " from save_to_disk"
        )
    return (entry for path in files for entry in read_file(path, max_row_chars))


def read_hub(source: Source) -> RawRows:
    """A data set of the hub, or of its cache when offline. Code that comes with a data set is never run."""
    import datasets

    path = str(source.path)
    options: dict[str, Any] = {} if source.split is None else {"split": source.split}
    try:
        dataset = datasets.load_dataset(path, source.name, **options)
    except Exception as why:  # anything from a network error to a wrong split; each says what is wrong
        reason = str(why).strip().split("\n", 1)[0]
        near = did_you_mean(path, sorted(file.name for file in Path().iterdir()))
        raise RecipeError(
            f"'{path}' is neither a file{near} nor a data set that can be loaded: {reason}"
        ) from None
    return read_dataset(dataset, source, path)


def read_dataset(dataset: Any, source: Source, label: str) -> RawRows:
    """Rows of a Dataset, or of one split of a DatasetDict; a class label gets its name beside it
    (`label_name`).
    """
    if hasattr(dataset, "keys"):
        split = source.split
        if split is None and "train" in dataset:
            split = "train"
        elif split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise RecipeError(f"{label} has no split '{split or 'train'}' (there is: {', '.join(dataset)})")
        dataset = dataset[split]
    feature = dataset.features.get("label")
    class_names = feature.names if hasattr(feature, "int2str") else None
    for i, row in enumerate(dataset, 1):
        value = row.get("label")
        if class_names is not None and value is not None and value >= 0:
            row = {**row, "label_name": class_names[value]}
        yield f"{label}:{i}", row
