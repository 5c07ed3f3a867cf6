"""A folder of data files: which of them hold rows, of which split and subset, and what beside them says how
they are read.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from luthier.data.files import READERS
from luthier.data.lines import file_kind
from luthier.errors import RecipeError
from luthier.recipe.in_memory import HELD_OUT

DATASET_INFO = "dataset_info.json"
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"-\d{4,}-of-\d{4,}(-[0-9a-f]+)?$")  # train-00000-of-00003
WORD = re.compile(r"[^a-z]+")
# what stands beside rows: documents, and files that systems and models leave
DOCUMENT = re.compile(
    r"(read[-_ ]?me|licen[cs]e|notice|requirements|change[-_ ]?log|citation|contributing|authors|copying"
    r"|cmakelists|robots|datasheet|datacard)([^a-z].*)?$",
    re.IGNORECASE,
)
NOT_ROWS = frozenset(
    "dataset_info dataset_infos dataset_dict state config configuration generation_config adapter_config"
    " preprocessor_config tokenizer tokenizer_config special_tokens_map added_tokens vocab merges package"
    " package-lock tsconfig croissant datapackage model.safetensors.index pytorch_model.bin.index".split()
)
MAX_DEPTH = 5  # of folders in a folder
MAX_FILES = 20_000


@dataclass(frozen=True)
class DataFile:
    """A file of a folder. split: train, validation or test by its name; "" where the name says nothing.
    name: the same as it is written, e.g. train_sft. subset: the folder that it lies in, "" at the top.
    """

    path: Path
    split: str
    name: str
    subset: str


def data_files(folder: Path) -> list[DataFile]:
    """The files with rows in a folder, in the order of their names; those of its subfolders where it holds
    none itself (data/train-00000-of-00003.parquet).
    """
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not is_hidden(name) and depth < MAX_DEPTH)
        paths += [Path(place) / name for name in sorted(names) if holds_rows(Path(place) / name)]
        if paths and depth == 0:
            break
        if len(paths) > MAX_FILES:
            raise RecipeError(f"folder {folder} holds more than {MAX_FILES:,} data files")
    if any(file_kind(path) != ".md" for path in paths):  # beside rows they are notes about them
        paths = [path for path in paths if file_kind(path) != ".md"]
    return [data_file(path, folder) for path in paths]


def is_hidden(name: str) -> bool:
    """Whether a system, a tool or a cache made this file or folder."""
    return name.startswith((".", "__", "~$")) or name.endswith("~")


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name: no document, nothing that a system leaves."""
    if is_hidden(path.name) or file_kind(path) not in READERS or not path.is_file():
        return False
    stem = path.name.partition(".")[0].lower()
    if file_kind(path) in (".txt", ".md"):
        return not DOCUMENT.match(path.name)
    return stem not in NOT_ROWS and not DOCUMENT.fullmatch(stem)


def data_file(path: Path, folder: Path) -> DataFile:
    """A file of a folder with its split, by its own name or else by the folders that it lies in."""
    parts = path.relative_to(folder).parts
    name = SHARD.sub("", parts[-1].partition(".")[0])
    subset = ""
    for part in parts[:-1]:
        if not split_of(part) and part != "data":
            subset = part
            break
    for candidate in (name, *reversed(parts[:-1])):
        if split := split_of(candidate):
            return DataFile(path, split, candidate, subset)
    return DataFile(path, "", name, subset)


def split_of(name: str) -> str:
    """train, validation or test, by a word of a name; "" where it has none."""
    words = set(WORD.split(name.lower()))
    for split, spellings in SPLIT_WORDS.items():
        if words.intersection(spellings):
            return split
    return ""


def choose_files(
    files: Sequence[DataFile], folder: Path, split: str | None, subset: str | None
) -> list[Path]:
    """The files to read: of a subset if one is named; of the split that is named, else all that are neither
    validation nor test. Raises RecipeError where there are none, or where it is not clear which are meant.
    """
    by_split: dict[str, list[DataFile]] = defaultdict(list)
    by_name: dict[str, list[DataFile]] = defaultdict(list)
    subsets: set[str] = set()
    for file in files:
        subsets.add(file.subset)
        if subset in (None, file.subset):
            by_split[file.split].append(file)
            by_name[file.name].append(file)
    if subset is not None and not by_name:
        raise RecipeError(f"folder {folder} has no subset '{subset}' (there is: {listed(sorted(subsets))})")
    if split is None:
        chosen = by_split["train"] or by_split[""] or list(chain(*by_name.values()))
    else:
        chosen = by_name.get(split) or by_split.get(split) or []
        if not chosen:
            splits = sorted({*by_split, *by_name} - {""})
            raise RecipeError(f"folder {folder} has no split '{split}' (there is: {listed(splits)})")
    splits = sorted({file.name for file in chosen if SHARD.search(file.path.name.partition(".")[0])})
    if len(splits) > 1 and split not in splits:
        raise RecipeError(f"folder {folder} has the splits {listed(splits)}; choose one with `split:`")
    return [file.path for file in chosen]


def own_held_out(folder: Path, subset: str | None = None) -> str | None:
    """The split of a folder that is held out: its validation rows, else its test rows; None where there are
    only rows of one kind.
    """
    splits = {file.split for file in data_files(folder) if subset is None or file.subset == subset}
    for split in HELD_OUT:
        if split in splits and not splits <= {*HELD_OUT}:
            return split
    return None


def describe(files: Sequence[DataFile], chosen: Iterable[Path], folder: Path) -> str:
    """Which files of a folder are read as rows, and which are not."""
    chosen = set(chosen)
    read: list[str] = []
    others: list[str] = []
    for file in files:
        side = read if file.path in chosen else others
        side.append(str(file.path.relative_to(folder)))
    if others:
        return f"{folder}: rows are read from {listed(read)}, not from {listed(others)}"
    return f"{folder}: rows are read from {listed(read)}"


def listed(names: Sequence[str]) -> str:
    """Some names, the first of many."""
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return ", ".join(names) or "none"


def entries_beside(folder: Path) -> dict[str, str]:
    """File name -> the entry of LLaMA-Factory's dataset_info.json in the same folder that reads it."""
    path = folder / DATASET_INFO
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    by_file: dict[str, str] = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            by_file.setdefault(entry["file_name"], name)
    return by_file
