"""Rows of a run: sources read into rows of one canonical form, and split into training and held-out rows.

One bad row never ends a run: it is set aside with its place and the reason. Too many do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.audio import arrays_in_files, audio_in_files
from luthier.data.files import too_long
from luthier.data.images import images_in_files, place_images
from luthier.data.lines import BadLine
from luthier.data.nested import unnested
from luthier.data.quarantine import bad_row, check_bad_rows, write_quarantine
from luthier.data.recognise import every_format, format_of_row, matching_formats, recognise_format
from luthier.data.sources import Source, expand, held_out_source, is_row, read_source, resolve_source
from luthier.data.split import former_split, split
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, Format, kind_of
from luthier.recipe.in_memory import MAX_DEPTH, plain_value
from luthier.recipe.recipe import Recipe
from luthier.registry import build, did_you_mean
from luthier.storage.toy import current_row, former_row

HELD_OUT_SHARE = 0.05  # of the rows, where the data bring none that are meant for it; of few rows a tenth
FEW = 16  # rows up to which a tenth is held out
MOST = 2000  # rows that are held out unless a recipe says how many: more would tell nothing that these do not
# columns that are read of every row, whatever its format
READ_COLUMNS = (
    ("prefix", str, "text"),
    ("tools", list, "a list"),
    ("chat_template_kwargs", dict, "an object"),
    ("token_weights", list, "a list"),
)
NESTED = "is nested too deeply"
MAX_BITS = 1024  # of a whole number: what a float holds
MAX_NAME = 1000  # characters of a column's name
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
ENOUGH = 10  # rows of which some are held out however small the share; of fewer, where it is a row or nearly


@dataclass
class LoadedRows:
    """Rows of one or several sources in canonical form."""

    rows: list[dict]
    bad: list[dict] = field(default_factory=list)  # as `bad_row` makes them
    format: str = ""  # the name of the format; several joined by " + "
    total: int = 0  # rows read, good and bad
    notes: list[str] = field(default_factory=list)  # what a user should know of their origin


@dataclass
class Data:
    """The rows of a run."""

    rows: list[dict]  # to train on
    held_out: list[dict]
    bad: list[dict]  # as `bad_row` makes them
    fingerprint: str  # of rows and held_out; a resumed run must have the same
    format: str = ""  # what they were read as
    notes: list[str] = field(default_factory=list)  # what a user should know of their origin

    def former_fingerprint(self) -> str:
        """The fingerprint that version 0.1 gave these rows, whose toy tasks had another column."""
        return fingerprint_of(list(map(former_row, self.rows)), list(map(former_row, self.held_out)))


def load_data(recipe: Recipe, quarantine: Path | None = None, fingerprint: str = "") -> Data:
    """The recipe's rows in canonical form, split, with the bad ones apart (and written to `quarantine`).

    fingerprint: of the rows of a run that began earlier. Where an earlier default or version 0.1 split them
    into these, they stay so.
    Raises RecipeError where there is no data, or an eval_data that makes no sense, and as `load_rows` does.
    """
    if recipe.data is None:
        raise RecipeError(
            "the recipe has no `data`; set it to a file, a folder, a Hub name, rows, or toy:TASK"
        )
    loaded = load_rows(recipe.data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
    rows, bad, notes = loaded.rows, loaded.bad, loaded.notes
    held_out: list[dict] = []
    eval_data = former_share = recipe.eval_data
    if eval_data == "auto":
        own = own_held_out(recipe.data)
        eval_data = own or default_share(len(rows))
        former_share = HELD_OUT_SHARE
        if own:
            splits = " and ".join(str(source.split) for source in own)
            notes = [*notes, f"held-out rows: the data's own ({splits}); `eval_data: 0.05` holds out others"]
    if isinstance(eval_data, (int, float)) and not isinstance(eval_data, bool):
        if not 0 <= eval_data < 1:
            raise RecipeError(f"eval_data: {eval_data} must be a fraction from 0 to below 1, or a file")
        former = _former_data(loaded, former_share, fingerprint)
        if former is not None:
            return former
        if eval_data and (len(rows) >= ENOUGH or len(rows) * eval_data >= 0.5):
            # whatever the seed: runs with other seeds are measured on the same rows
            rows, held_out = split(rows, eval_data)
    elif eval_data:
        other = load_rows(eval_data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
        held_out, bad = other.rows, [*bad, *other.bad]
    return Data(rows, held_out, bad, fingerprint_of(rows, held_out), loaded.format, notes)


def default_share(rows: int) -> float:
    """The share of so many rows that is held out: of few a tenth, of fewer than ten less than a row, and of
    many no more than MOST.
    """
    if rows < ENOUGH:
        return HELD_OUT_SHARE
    return max(min(HELD_OUT_SHARE, MOST / rows), min(0.1, FEW / rows))


def own_held_out(data: Any) -> list[Source]:
    """The validation or test rows that the sources bring; none where they bring none."""
    own = []
    for each in list_of_sources(data):
        source = held_out_source(resolve_source(each))
        if source is not None:
            own.append(source)
    return own


def _former_data(loaded: LoadedRows, fraction: float, fingerprint: str) -> Data | None:
    """The rows as an earlier default share or version 0.1 split them, if they then have this fingerprint."""
    if not fingerprint:
        return None
    for divided in (split, former_split):
        rows, held_out = divided(loaded.rows, fraction)
        data = Data(
            rows, held_out, loaded.bad, fingerprint_of(rows, held_out), loaded.format, list(loaded.notes)
        )
        if fingerprint in (data.fingerprint, data.former_fingerprint()):
            return data
    return None


def fingerprint_of(rows: list[dict], held_out: list[dict]) -> str:
    """What tells these rows from others."""
    content = json.dumps([rows, held_out], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- sources


def load_rows(
    source: Any,
    *,
    max_bad_rows: float = 0.05,
    max_row_chars: int = 1_000_000,
    format: str | dict | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    quarantine: str | Path | None = None,
) -> LoadedRows:
    """Rows of a source, or of a list of sources, in canonical form.

    A source is a list of rows; a path to .jsonl, .json, .csv, .tsv, .parquet, .txt or .md (.gz too); a folder
    of such files or one written by `save_to_disk`; `toy:TASK/SPLIT`; the name of a data set on the hub; an
    entry of LLaMA-Factory's dataset_info.json (`dataset_info.json:NAME`) or of axolotl's `datasets:`; or
    {path, split, name, format, columns, tags, limit}.

    max_bad_rows: the share of a source's rows that may be bad. quarantine: where the bad rows are written.
    Raises RecipeError for what cannot be found or recognised, TooManyBadRows where more are bad.
    """
    settings = {"format": format, "columns": columns, "limit": limit}
    settings = {key: value for key, value in settings.items() if value is not None}
    whole = LoadedRows([])
    formats: dict[str, None] = {}  # in the order of the sources, each once
    ids: set[str] = set()
    for each in list_of_sources(source):
        resolved = resolve_source(each).model_copy(update=settings)
        parts, notes = expand(resolved)
        whole.notes += notes
        for part in parts:
            loaded = load_source(part, ids, max_bad_rows, part.max_row_chars or max_row_chars, quarantine)
            whole.rows += loaded.rows
            whole.bad += loaded.bad
            whole.total += loaded.total
            whole.notes += loaded.notes
            formats[loaded.format] = None
    whole.format = " + ".join(formats)
    if quarantine is not None:
        write_quarantine(whole.bad, quarantine)
    return whole


def list_of_sources(source: Any) -> Sequence[Any]:
    """The sources of a list of them; anything else, a list of rows too, is one source."""
    several = isinstance(source, (list, tuple)) and source and not any(map(is_row, source))
    return source if several else [source]


def load_source(
    source: Source, ids: set[str], max_bad_rows: float, max_row_chars: int, quarantine: str | Path | None
) -> LoadedRows:
    """One source. ids: those of rows loaded before, to which its own are added."""
    raw_rows, bad = read_raw_rows(source, max_row_chars)
    if not raw_rows and not bad:
        raise RecipeError(f"{source.label} has no rows")
    if not raw_rows:
        check_bad_rows(bad, len(bad), source.label, max_bad_rows, quarantine)
    raw_rows, notes = in_known_names(raw_rows, source)
    if not source.format:
        raw_rows, place = unnested(raw_rows, source.label)
        raw_rows, notes = raw_rows[: source.limit], [*notes, *place]
    total = len(raw_rows) + len(bad)
    file_format = format_of_source(source, raw_rows)
    rows: list[dict] = []
    for where, raw in raw_rows:
        try:
            row = format_of_row(raw, file_format, bool(source.format)).row(raw)
            check_columns(row)
            row = place_images(row)
        except BadRow as why:
            bad.append(bad_row(where, str(why), raw))
            continue
        except Exception as why:  # what nobody thought of: one row never ends a run
            bad.append(bad_row(where, f"cannot be read ({type(why).__name__}: {str(why)[:100]})", raw))
            continue
        if source.source:
            row["source"] = source.source
        row["id"] = unique_id(raw.get("id"), where, ids)
        rows.append(row)
    check_bad_rows(bad, total, source.label, max_bad_rows, quarantine)
    return LoadedRows(rows, bad, file_format.name, total, notes)


def read_raw_rows(source: Source, max_row_chars: int) -> tuple[list[tuple[str, dict]], list[dict]]:
    """((place, raw row), bad rows) of a source: each row under our names, and those that no format can read
    apart.
    """
    raw_rows: list[tuple[str, dict]] = []
    bad: list[dict] = []
    columns: set[str] = set()
    too_big = too_long(max_row_chars)
    folder = folder_of(source)
    for where, raw in islice(read_source(source, max_row_chars), source.limit):
        if isinstance(raw, BadLine):
            bad.append(bad_row(where, raw.reason, raw.raw))
            continue
        try:
            raw = arrays_in_files(raw)
        except BadRow as why:
            bad.append(bad_row(where, str(why), raw))
            continue
        problem = problem_of(raw, max_row_chars)
        if problem == too_big and (pieces := pieces_of_text(raw, source, max_row_chars)):
            columns.update(raw)
            raw_rows += [(f"{where}#{k}", piece) for k, piece in enumerate(pieces)]
        elif problem:
            bad.append(bad_row(where, problem, raw))
        else:
            columns.update(raw)
            try:
                row = images_in_files(apply_names(plain_value(raw), source), folder)
                raw_rows.append((where, audio_in_files(row, folder)))
            except BadRow as why:
                bad.append(bad_row(where, str(why), raw))
    for theirs in source.columns.values():
        if raw_rows and theirs not in columns:
            raise RecipeError(
                f"{source.label} has no column '{theirs}', which columns: maps{did_you_mean(theirs, columns)}"
            )
    return raw_rows, bad


def folder_of(source: Source) -> Path | None:
    """The folder that paths in a source's rows are relative to; None of rows in memory."""
    if not isinstance(source.path, str):
        return None
    path = os.path.expanduser(source.path)
    return Path(path if os.path.isdir(path) else os.path.dirname(path))  # os.path never raises: a long name


def check_columns(row: dict) -> None:
    """Refuse a row with a column that luthier reads, but that its format did not, in another shape."""
    for name, kind, words in READ_COLUMNS:
        if name in row and not isinstance(row[name], kind):
            raise BadRow(f"{name} is {kind_of(row[name])}, not {words}")
    for weights in row.get("token_weights", ()):
        if not isinstance(weights, list) or not all(isinstance(w, (int, float)) for w in weights):
            raise BadRow("token_weights is not a list of numbers for each completion")


def pieces_of_text(raw: dict, source: Source, max_row_chars: int) -> list[dict]:
    """A row of plain text that is too long, in pieces that end at a line or a word, so that nothing of it is
    lost; none where it is another kind of row.
    """
    row = apply_names(plain_value(raw), source)
    text = row.get("text")
    formats = matching_formats(row)
    if not isinstance(text, str) or not formats or formats[0].name != "text":
        return []
    if source.format and build("format", source.format).name != "text":
        return []
    rest = dict(row)
    del rest["text"]
    if problem_of({**rest, "text": ""}, max_row_chars // 2):
        return []
    size = max_row_chars // 2
    pieces = []
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = max(text.rfind("\n", start, end), text.rfind(" ", start, end)) + 1 or end
        piece = text[start:end]
        start = end
        if piece.strip():
            pieces.append({**rest, "text": piece})
    return pieces


def in_known_names(
    raw_rows: list[tuple[str, dict]], source: Source
) -> tuple[list[tuple[str, dict]], list[str]]:
    """Rows under the names that formats have, where theirs differ in spaces and upper case alone (`Prompt`,
    ` completion`), and a sentence that says so. Rows that some format reads as they are stay as they are.
    """
    if source.format or any(matching_formats(raw) for _, raw in raw_rows[:100]):
        return raw_rows, []
    columns: set[str] = set()
    for cls in every_format():
        columns.update(*(shape.split() for shape in cls.columns), cls.optional.split())
    names = {}
    for _, raw in raw_rows[:100]:
        for name in raw:
            plain = "_".join(name.replace("\ufeff", "").lower().split())
            if plain != name and plain in columns and plain not in raw:
                names[name] = plain
    if not names or not matching_formats(names.values()):
        return raw_rows, []
    renamed = []
    for where, raw in raw_rows:
        renamed.append((where, {names.get(name, name): value for name, value in raw.items()}))
    listed = ", ".join(f"'{theirs}' as '{ours}'" for theirs, ours in names.items())
    return renamed, [f"{source.label}: columns are read under other names: {listed}"]


def format_of_source(source: Source, raw_rows: Sequence[tuple[str, dict]]) -> Format:
    """The format that a source names, or the one that its rows have by their columns."""
    if source.format:
        return build("format", source.format)
    return recognise_format([raw for _, raw in raw_rows], source.label)


def problem_of(raw: dict, max_row_chars: int) -> str | None:
    """Why no format can read a row: too long, nested too deeply, text or names of columns that are none."""
    total = 0
    stack: list[tuple[Any, int]] = [(raw, 0)]
    while stack:
        value, depth = stack.pop()
        total += 1
        if isinstance(value, str):
            total += len(value)
            if problem := problem_of_text(value):
                return problem
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            return "contains a number that is too large"
        elif isinstance(value, (dict, list, tuple)):
            if depth > MAX_DEPTH:
                return NESTED
            if total + len(value) > max_row_chars:
                return too_long(max_row_chars)
            if isinstance(value, dict):
                if problem := problem_of_names(value):
                    return problem
                total += sum(map(len, value))
                value = value.values()
            stack += [(inner, depth + 1) for inner in value]
    return too_long(max_row_chars) if total > max_row_chars else None


def problem_of_text(text: str) -> str | None:
    """Why a text cannot be learned or written."""
    if "\0" in text:
        return "contains a NUL byte"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "contains a lone surrogate, which is not a character"
    return None


def problem_of_names(names: Iterable[Any]) -> str | None:
    """Why names of columns, or of keys in a cell, cannot be used."""
    for name in names:
        if not isinstance(name, str):
            return f"has a column whose name is not text but {type(name).__name__}"
        if len(name) > MAX_NAME:
            return f"has a column whose name is longer than {MAX_NAME:,} characters"
        if problem := problem_of_text(name):
            return f"has a column whose name {problem}"
        if CONTROL.search(name):
            return "has a column whose name contains a control character"
    return None


def apply_names(raw: dict, source: Source) -> dict:
    """A row under our names of columns, roles and keys, without columns that are null in it (parquet and csv
    give every row every column).
    """
    if source.columns:
        row = {}
        mapped = set(source.columns.values())
        for name, value in raw.items():
            if name not in mapped and name not in source.columns:
                row[name] = value
        for ours, theirs in source.columns.items():
            if theirs in raw:
                row[ours] = raw[theirs]
        raw = row
    if source.prompt_layout:
        raw = source.prompt_layout.apply(raw)
    if source.tags:
        raw = {name: apply_tags(value, source.tags) for name, value in raw.items()}
    return current_row({name: value for name, value in raw.items() if value is not None})


def apply_tags(value: Any, tags: dict[str, str]) -> Any:
    """Messages whose keys and roles are renamed; anything else as it is."""
    if isinstance(value, list):
        return [apply_tags(inner, tags) for inner in value]
    if not isinstance(value, dict):
        return value
    turn: dict = {}
    for key, inner in value.items():
        name = tags.get(key, key)
        if not turn.get(name):  # what is empty gives way to a key that is mapped to it
            turn[name] = inner
        elif name != key:
            turn[name] = inner or turn[name]
    role = turn.get("role")
    if isinstance(role, str):
        turn["role"] = tags.get(role, role)
    return turn


def unique_id(own: Any, where: str, ids: set[str]) -> str:
    """A row's own id, or its place; one that is there already gets ~2, ~3, ... It is added to `ids`."""
    base = str(own) if isinstance(own, (str, int)) and str(own).strip() else where
    name = base
    n = 2
    while name in ids:
        name = f"{base}~{n}"
        n += 1
    ids.add(name)
    return name


def sample_rows(recipe: Recipe) -> list[dict]:
    """The first hundred rows of a recipe, to validate it with; none where it names no data."""
    if recipe.data is None:
        return []
    return load_data(recipe).rows[:100]
