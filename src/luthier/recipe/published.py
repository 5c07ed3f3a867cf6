"""Published pipelines as recipes: `luthier tune recipe:tulu-3 --model MODEL --data FOLDER`.

A file of the folder papers holds what a paper did, in a recipe's own keys (`recipe`), the kinds of rows that
it trains on (`rows`: what they hold, where the authors' are, and the toy rows that stand in their stead), and
changes for a run of minutes on toy rows (`toy`). In `recipe`, `rows:NAME` stands where the rows of that name
are read.

    luthier tune recipe:tulu-3                              the pipeline on a toy model and toy rows
    luthier tune recipe:tulu-3 --model M --data FOLDER      FOLDER/sft.jsonl, FOLDER/preference.jsonl, ...
    luthier tune recipe:tulu-3 --model M data.sft=FILE ...  each kind of rows by itself
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError, quoted
from luthier.registry import did_you_mean
from luthier.storage.bounded_yaml import read_yaml

FOLDER = Path(__file__).with_name("papers")
PREFIX, ROWS = "recipe:", "rows:"
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".yaml", "")
ALL_ROWS, TOY = "data", "toy"
KEYS = ("title", "paper", "row", "covers", "omits", "tests", "rows", "recipe", "toy")


@dataclass(frozen=True)
class Rows:
    """One kind of rows of a pipeline."""

    holds: str  # columns, in words
    source: str  # where the authors' rows are
    toy: Any  # the toy rows in their stead, as `data` of a recipe


@dataclass(frozen=True)
class Published:
    """A file of the folder papers."""

    name: str
    title: str  # the first line of its comment
    paper: str
    rows: dict[str, Rows]
    recipe: dict[str, Any]
    toy: dict[str, Any]
    row: str = ""  # short name of its paper in the catalogue
    covers: str = ""
    omits: str = ""
    tests: tuple[str, ...] = field(default=())

    def at_toy_scale(self) -> dict[str, Any]:
        """The recipe on its toy rows, with the changes for minutes."""
        rows = {name: kind.toy for name, kind in self.rows.items()}
        return merge(place(self.recipe, rows), self.toy)

    def on(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe as it was published, on these rows. Raises RecipeError where a kind is missing."""
        missing = [name for name in self.rows if name not in rows]
        if missing:
            lines = [f"{PREFIX}{self.name} reads {len(self.rows)} kinds of rows; missing:"]
            for name in missing:
                kind = self.rows[name]
                lines.append(f"  {name}: {kind.holds} (the authors': {kind.source})")
            lines.append(
                f"name a folder with {missing[0]}.jsonl and so on (--data FOLDER), or each"
                f" (data.{missing[0]}=FILE); --data {TOY} reads the toy rows"
            )
            raise RecipeError("\n".join(lines))
        return place(self.recipe, rows)


def is_published(name: Any) -> bool:
    """Whether a name is `recipe:NAME`."""
    return isinstance(name, str) and name.startswith(PREFIX)


@cache
def published() -> dict[str, Published]:
    """Name -> pipeline, of every file."""
    pipelines = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        pipelines[path.stem] = read_published(path)
    return pipelines


def read_published(path: Path) -> Published:
    """A pipeline from its file. Raises RecipeError for a file of another shape."""
    fields = read_yaml(path)
    unknown = sorted(set(fields) - set(KEYS)) if isinstance(fields, dict) else ["no mapping"]
    if unknown or not isinstance(fields.get("recipe"), dict) or not isinstance(fields.get("rows"), dict):
        raise RecipeError(f"{path}: a published recipe has the keys {', '.join(KEYS)}; here: {unknown}")
    rows = {name: Rows(**kind) for name, kind in fields["rows"].items()}
    tests = tuple(fields.get("tests") or ())
    return Published(**{**fields, "name": path.stem, "rows": rows, "tests": tests})


def find_published(name: str) -> Published:
    """The pipeline of `recipe:NAME`. Raises RecipeError for an unknown name, with the nearest one."""
    name = name.removeprefix(PREFIX)
    if name not in published():
        raise RecipeError(f"there is no published recipe '{name}'{did_you_mean(name, published())}")
    return published()[name]


def resolve(name: str, changes: list[tuple[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The recipe that `recipe:NAME` with these changes stands for, and the changes that are left to be made.

    Without a model and rows it is the pipeline at toy scale. Raises RecipeError where rows are missing.
    """
    pipeline = find_published(name)
    rows: dict[str, Any] = {}
    others = []
    for key, value in changes:
        first, _, kind = key.partition(".")
        if key == ALL_ROWS:
            rows |= rows_of(pipeline, value)
        elif first == ALL_ROWS and kind in pipeline.rows:
            rows[kind] = value
        else:
            others.append((key, value))
    if not rows and not any(key == "model" for key, _ in changes):
        return pipeline.at_toy_scale(), others
    return pipeline.on(rows), others


def rows_of(pipeline: Published, value: Any) -> dict[str, Any]:
    """Kind -> rows, of what `data` names: the toy rows, a folder with a file for each kind, a mapping of
    them, or, where the pipeline reads one kind, these rows.
    """
    if value == TOY:
        return {name: kind.toy for name, kind in pipeline.rows.items()}
    if isinstance(value, Mapping) and value.keys() & pipeline.rows.keys():
        return dict(value)
    if len(pipeline.rows) == 1:
        return dict.fromkeys(pipeline.rows, value)
    if not isinstance(value, (str, Path)) or not Path(value).is_dir():
        raise RecipeError(
            f"{PREFIX}{pipeline.name} reads {', '.join(pipeline.rows)}: data must be a folder with a file for"
            f" each, such as {next(iter(pipeline.rows))}.jsonl, not {quoted(value)}"
        )
    rows = {}
    for name in pipeline.rows:
        for suffix in SUFFIXES:
            path = Path(value) / f"{name}{suffix}"
            if path.exists():
                rows[name] = str(path)
                break
    return rows


def place(value: Any, rows: Mapping[str, Any]) -> Any:
    """A copy of a value in which every `rows:NAME` is these rows."""
    if isinstance(value, str) and value.startswith(ROWS):
        return copy.deepcopy(rows[value.removeprefix(ROWS)])
    if isinstance(value, Mapping):
        return {key: place(inner, rows) for key, inner in value.items()}
    if isinstance(value, list):
        return [place(inner, rows) for inner in value]
    return value


def merge(value: Any, changes: Any) -> Any:
    """A value with changes of the same shape: mappings by key, lists of as many by place; else the change,
    and so where it names another method.
    """
    if isinstance(value, Mapping) and isinstance(changes, Mapping):
        if changes.get("name") not in (None, value.get("name")):
            return changes
        merged = dict(value)
        for key, change in changes.items():
            merged[key] = merge(value[key], change) if key in value else change
        return merged
    both_lists = isinstance(value, list) and isinstance(changes, list)
    if both_lists and len(value) == len(changes) and isinstance(changes[0], Mapping):
        return [merge(inner, change) for inner, change in zip(value, changes)]
    return value if changes is None else changes
