"""Files to rows: reads what people have, recognises its shape by its columns, and sets aside what cannot be
used.

One bad row never ends a run: it goes to `bad` with the place and the reason. Too many do, in one sentence.
The shapes are in formats/, a file each; this module knows files, encodings, hubs and the dataset lists of
other tools.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.data.readers import READERS, Bad, Read, objected, over, read_file, suffix
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, Format, fitting, format_class, telling
from luthier.registry import build, did_you_mean, format_errors, names
from luthier.storage.toy import is_toy, toy_name, toy_package

AXOLOTL_TYPES = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt", "chat_template": None}
LF_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
LF_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


class TooManyBadRows(RecipeError):
    """More rows are bad than max_bad_rows allows; `bad` holds them."""

    def __init__(self, message: str, bad: list[dict]):
        super().__init__(message)
        self.bad = bad


@dataclass
class Loaded:
    """What came of a source: rows in the house's shape, the bad ones, the format recognised, and how many
    were read.
    """

    rows: list[dict]
    bad: list[dict] = field(default_factory=list)  # {"where": "rows.jsonl:17", "reason": "...", "raw": "..."}
    format: str = ""  # the name of the format; several joined by " + "
    seen: int = 0  # rows read, good and bad


class Source(BaseModel):
    """One place that rows come from."""

    model_config = ConfigDict(extra="forbid")

    path: str | list  # a file, a folder, toy:TASK/SPLIT, a hub name, or the rows themselves
    split: str | None = None  # a split of a hub data set, a saved data set or a toy task (train)
    name: str | None = None  # the configuration of a hub data set, or the entry of a dataset_info.json
    # a format's name or {name, settings}; recognised by columns where not given
    format: str | dict | None = None
    columns: dict[str, str] = {}  # our name of a column: the file's name of it
    tags: dict[str, str] = {}  # the file's names of roles and keys in messages: ours
    limit: int | None = Field(default=None, ge=1)  # rows to read at most
    n: int = Field(default=1000, ge=1)  # rows to generate of a toy task
    seed: int = 0  # of a toy task
    source: str | None = None  # what the column `source` of its rows says, for objective by_source


def load(
    source: Any,
    *,
    max_bad_rows: float = 0.05,
    max_row_chars: int = 1_000_000,
    format: str | dict | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    quarantine: str | Path | None = None,
) -> Loaded:
    """Rows of a source, or of a list of sources, in the house's shape.

    A source is a list of rows; a path to .jsonl, .json, .csv, .tsv, .parquet or .txt (.gz too); a folder of
    such files or one written by `save_to_disk`; `toy:TASK/SPLIT`; the name of a data set on the hub; an
    entry of LLaMA-Factory's dataset_info.json (`dataset_info.json:NAME`) or of axolotl's `datasets:`; or
    {path, split, name, format, columns, tags, limit}.

    max_bad_rows: the share of a source's rows that may be bad. quarantine: where the bad rows are written.
    Raises RecipeError for what cannot be found or recognised, TooManyBadRows where more are bad.
    """
    several = (
        isinstance(source, (list, tuple)) and bool(source) and not any(looks_like_row(s) for s in source)
    )
    parts, taken = [], set()
    for each in source if several else [source]:
        wanted = resolve(each)
        given = {"format": format, "columns": columns, "limit": limit}
        wanted = wanted.model_copy(update={k: v for k, v in given.items() if v is not None})
        parts.append(load_one(wanted, taken, max_bad_rows, max_row_chars, quarantine))
    told = " + ".join(dict.fromkeys(p.format for p in parts))
    whole = Loaded(
        [r for p in parts for r in p.rows],
        [b for p in parts for b in p.bad],
        told,
        sum(p.seen for p in parts),
    )
    if quarantine is not None and whole.bad:
        write_quarantine(whole.bad, quarantine)
    return whole


def load_one(
    source: Source, taken: set, max_bad_rows: float, max_row_chars: int, quarantine: str | Path | None
) -> Loaded:
    """One source. `taken` holds the ids given so far."""
    raws, bad, columns = [], [], set()
    for where, raw in islice(read(source, max_row_chars), source.limit):
        if isinstance(raw, Bad):
            bad.append(told(where, raw.reason, raw.raw))
        elif reason := unfit(raw, max_row_chars):
            bad.append(told(where, reason, raw))
        else:
            columns |= raw.keys()
            raws.append((where, present(renamed(raw, source))))
    label = shown(source)
    seen = len(raws) + len(bad)
    if not seen:
        raise RecipeError(f"{label} holds no rows")
    absent = next((theirs for theirs in source.columns.values() if raws and theirs not in columns), None)
    if absent is not None:
        raise RecipeError(
            f"{label} has no column '{absent}', which columns: maps{did_you_mean(absent, columns)}"
        )
    fixed = bool(source.format)
    chosen: Any = (
        build("format", source.format)
        if fixed
        else recognise([raw for _, raw in raws], label)
        if raws
        else None
    )
    rows = []
    for where, raw in raws:
        try:
            row = reader(raw, chosen, fixed).row(raw)
        except BadRow as why:
            bad.append(told(where, str(why), raw))
            continue
        named = {"source": source.source} if source.source else {}
        rows.append({**row, **named, "id": unused(raw.get("id"), where, taken)})
    if not rows or len(bad) > max_bad_rows * seen:
        if quarantine is not None:
            write_quarantine(bad, quarantine)
        raise TooManyBadRows(refusal(bad, seen, label, max_bad_rows, quarantine), bad)
    return Loaded(rows, bad, chosen.name, seen)


def looks_like_row(value: Any) -> bool:
    """Whether a dict is a row rather than a source: sources have a path and no columns of a format."""
    return isinstance(value, dict) and not (
        {"path", "file_name", "hf_hub_url"} & value.keys() and not fitting(value.keys())
    )


def shown(source: Source) -> str:
    """How messages call a source."""
    return source.path if isinstance(source.path, str) else "the list of rows"


def told(where: str, reason: str, raw: Any) -> dict:
    """A line of the quarantine."""
    if isinstance(raw, bytes):
        raw = raw[:2000].decode("utf-8", "backslashreplace")
    elif not isinstance(raw, str):
        raw = json.dumps(raw, ensure_ascii=False, default=repr)
    return {"where": where, "reason": reason, "raw": raw[:500]}


def refusal(bad: list[dict], seen: int, label: str, allowed: float, quarantine: str | Path | None) -> str:
    """Why so many bad rows end the run: the count, the commonest reasons with their first place, where all
    are.
    """
    kinds = [(b["reason"].partition(" (")[0], b["where"]) for b in bad]
    first = dict(reversed(kinds))
    common = Counter(reason for reason, _ in kinds).most_common(3)
    reasons = "; ".join(f"{reason} ({n} row{'s' * (n > 1)}, first {first[reason]})" for reason, n in common)
    written = f"; all are in {quarantine}" if quarantine is not None else ""
    share = f"{len(bad):,} of {seen:,} rows of {label} are bad, more than max_bad_rows={allowed:g} allows"
    return f"{share}: {reasons}{written}"


def unused(own: Any, where: str, taken: set) -> str:
    """A row's own id, or its place; one that is taken gets ~2, ~3, ..."""
    name = first = str(own) if isinstance(own, (str, int)) and str(own).strip() else where
    n = 2
    while name in taken:
        name, n = f"{first}~{n}", n + 1
    taken.add(name)
    return name


# ---------------------------------------------------------------------------------------------- recognising


def recognise(raws: list[dict], label: str) -> Format:
    """The format of most rows. Raises RecipeError where none or several fit."""
    by_columns: dict[frozenset, list[dict]] = {}
    for raw in raws:
        by_columns.setdefault(frozenset(raw), []).append(raw)
    votes = Counter()
    for columns, group in by_columns.items():
        first = pick(columns, group[:32])
        votes[first] += len(group)
    best = next((name for name, _ in votes.most_common() if name), None)
    if best is None:
        columns = max(by_columns, key=lambda c: len(by_columns[c]))
        raise RecipeError(unrecognised(columns, label))
    if "|" in best:
        columns = max(
            (c for c in by_columns if pick(c, by_columns[c][:32]) == best), key=lambda c: len(by_columns[c])
        )
        raise RecipeError(
            f"{label}: the columns {', '.join(sorted(columns))} fit {best.replace('|', ' and ')} alike:"
            f" say which, as in format: {best.partition('|')[0]}"
        )
    return build("format", best)


def pick(columns: frozenset, sample: list[dict]) -> str:
    """The name of the most telling format that reads these rows; 'a|b' where two are equally telling, ''
    where none.
    """
    found = fitting(columns)
    able = [c for c in found if sum(map(c().reads, sample)) * 2 >= len(sample)] or found
    alike = [c.name for c in able if telling(c, columns) == telling(able[0], columns)]
    return "|".join(alike)


def unrecognised(columns: Iterable[str], label: str) -> str:
    """What was seen, what the nearest formats want, and how to map names."""
    columns = sorted(columns)
    shapes = [(c, shape.split()) for c in map(format_class, names("format")) for shape in c.columns]
    # Those that share the largest part of their columns; where none shares any, the plainest.
    near = sorted(
        shapes,
        key=lambda s: (-len({*s[1]} & {*columns}) / len(s[1]), s[0].provides != {"completions"}, len(s[1])),
    )
    wanted = {c.name: f"{c.name} wants {' + '.join(shape)}" for c, shape in reversed(near)}
    listed = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
    nearest = "; ".join([*wanted.values()][:-5:-1])
    theirs = columns[0] if columns else "question"
    return (
        f"{label}: no format fits the columns {listed or '(none)'}; the nearest: {nearest}."
        f" Map names, ours first: columns: {{prompt: {theirs}, completion: ...}}"
    )


def reader(raw: dict, chosen: Format, fixed: bool) -> Format:
    """The format that reads a row: the file's, or one that gives the same kind of row (a mixed file). Raises
    BadRow.

    A file of Alpaca rows may hold some messages: both give completions. A preference pair among them is a bad
    row.
    """
    if chosen.matches(raw):
        return chosen
    other = next((c for c in fitting(raw) if not fixed and c.provides == chosen.provides), None)
    if other is None:
        seen = ", ".join(sorted(raw)) or "(none)"
        raise BadRow(f"the columns {seen[:200]} do not fit the file's format, {chosen.name}")
    return other(chat=chosen.chat)


def renamed(raw: dict, source: Source) -> dict:
    """A row under our names of columns, roles and keys."""
    if source.columns:
        ours = {theirs: name for name, theirs in source.columns.items()}
        missing = {k: v for k, v in raw.items() if k not in ours and k not in source.columns}
        raw = {**missing, **{name: raw[theirs] for theirs, name in ours.items() if theirs in raw}}
    if source.tags:
        raw = {k: retagged(v, source.tags) for k, v in raw.items()}
    return raw


def retagged(value: Any, tags: dict[str, str]) -> Any:
    """Messages whose keys and roles are renamed; anything else as it is."""
    if isinstance(value, list):
        return [retagged(v, tags) for v in value]
    if not isinstance(value, dict):
        return value
    turn = {tags.get(k, k): v for k, v in value.items()}
    role = turn.get("role")
    return {**turn, "role": tags.get(role, role)} if isinstance(role, str) else value


def present(raw: dict) -> dict:
    """A row without the columns that are null in it (parquet and csv give every row every column)."""
    return {k: v for k, v in raw.items() if v is not None}


def unfit(raw: dict, max_row_chars: int) -> str | None:
    """Why no format need look at a row: too long, NUL bytes, text that no encoding can write."""
    total = 0
    stack = list(raw.values())
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            total += len(value)
            if "\0" in value:
                return "holds a NUL byte"
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                return "holds half a character (a lone surrogate)"
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return over(max_row_chars) if total > max_row_chars else None


# ---------------------------------------------------------------------------------------------- finding


def resolve(source: Any) -> Source:
    """Anything that names a source -> Source. Raises RecipeError where it makes no sense."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, Path)):
        path, _, name = str(source).rpartition(":")
        if path.endswith("dataset_info.json"):
            return of_dataset_info(Path(path), name)
        if str(source).endswith("dataset_info.json"):
            return of_dataset_info(Path(source), None)
        return Source(path=str(source))
    if isinstance(source, (list, tuple)):
        return Source(path=list(source))
    if not isinstance(source, dict):
        raise RecipeError(f"data: give a path, a name, rows or {{path: ...}}, not {source!r}")
    spec = of_axolotl(source)
    if str(spec.get("path", "")).endswith("dataset_info.json"):
        found = of_dataset_info(Path(spec["path"]), spec.get("name"))
        return found.model_copy(update={k: v for k, v in spec.items() if k not in ("path", "name")})
    unknown = sorted(spec.keys() - Source.model_fields)
    if unknown:
        raise RecipeError(
            f"data: there is no setting '{unknown[0]}'{did_you_mean(unknown[0], Source.model_fields)}"
        )
    return validated(spec, "data")


def validated(spec: dict, label: str) -> Source:
    """A Source of checked values."""
    try:
        return Source.model_validate(
            {k: str(v) if isinstance(v, Path) else v for k, v in spec.items() if v is not None}
        )
    except ValidationError as error:
        raise RecipeError(f"{label}: {format_errors(error)}") from None


def of_axolotl(spec: dict) -> dict:
    """An entry of axolotl's `datasets:` in our words; ours pass through."""
    spec = dict(spec)
    columns, tags = dict(spec.pop("columns", None) or {}), dict(spec.pop("tags", None) or {})
    kind = spec.pop("type", None)
    if isinstance(kind, dict):  # a prompt of the user's own: field_instruction, field_output, ...
        theirs = {k.removeprefix("field_"): v for k, v in kind.items() if k.startswith("field_")}
        columns = {**theirs, **columns}
    elif kind is not None:
        name = str(kind).partition(".")[0].partition(":")[0]
        spec["format"] = spec.get("format") or AXOLOTL_TYPES.get(
            name, name if name in names("format") else None
        )
    if spec.pop("ds_type", None) or spec.get("path") in ("json", "csv", "parquet", "text"):
        spec["path"] = spec.pop("data_files", None) or spec.get("path")
    renames = {
        "field": "text",
        "field_messages": "messages",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "field_tools": "tools",
        "field_system": "system",
    }
    columns |= {ours: spec.pop(theirs) for theirs, ours in renames.items() if theirs in spec}
    tags |= {theirs: ours for ours, theirs in (spec.pop("message_property_mappings", None) or {}).items()}
    tags |= {
        theirs: ours
        for ours, many in (spec.pop("roles", None) or {}).items()
        for theirs in ([many] if isinstance(many, str) else many)
    }
    return {**spec, **({"columns": columns} if columns else {}), **({"tags": tags} if tags else {})}


def of_dataset_info(path: Path, name: str | None) -> Source:
    """An entry of LLaMA-Factory's dataset_info.json."""
    try:
        entries = json.loads(existing(path).read_text(encoding="utf-8"))
    except ValueError as why:
        raise RecipeError(f"{path} is not JSON: {why}") from None
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise RecipeError(f"{path} is no list of data sets")
    name = name or (next(iter(entries)) if len(entries) == 1 else None)
    if name not in entries:
        asked = (
            f"has no data set '{name}'{did_you_mean(name, entries)}"
            if name
            else f"lists several data sets: {', '.join(entries)}"
        )
        raise RecipeError(f"{path} {asked}; give {path.name}:NAME")
    entry = entries[name]
    given, tags = entry.get("columns") or {}, entry.get("tags") or {}
    columns = {LF_COLUMNS.get(k, k): v for k, v in given.items() if v}
    place = str(path.parent / entry["file_name"]) if "file_name" in entry else entry.get("hf_hub_url")
    if not place:
        raise RecipeError(f"{path}: '{name}' has neither file_name nor hf_hub_url")
    spec = {
        "path": place,
        "split": entry.get("split"),
        "name": entry.get("subset"),
        "columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs},
        "tags": {theirs: LF_TAGS[k] for k, theirs in tags.items() if k in LF_TAGS},
        "limit": entry.get("num_samples"),
    }
    return validated(spec, f"{path}: {name}")


def existing(path: Path) -> Path:
    """A path that exists; a sentence with the nearest file where it does not."""
    if path.exists():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}, so no {path.name} in it")
    raise RecipeError(
        f"there is no file {path}{did_you_mean(path.name, sorted(p.name for p in folder.iterdir()))}"
    )


def read(source: Source, max_row_chars: int) -> Read:
    """(place, raw row) of a source, in order."""
    if not isinstance(source.path, str):
        return ((f"rows:{i}", objected(r)) for i, r in enumerate(source.path, 1))
    if is_toy(source.path):
        return read_toy(source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return read_folder(path, source, max_row_chars)
    if path.is_file() or suffix(path) in READERS or source.path.startswith((".", "/", "~")):
        return read_file(existing(path), max_row_chars)
    return read_hub(source)


def read_toy(source: Source) -> Read:
    """Rows generated for a toy task."""
    task, _, split = toy_name(str(source.path)).partition("/")
    split = source.split or split or "train"
    try:
        rows = toy_package().rows(task, split, min(source.n, source.limit or source.n), source.seed)
    except (ValueError, KeyError) as why:
        raise RecipeError(f"{source.path}: {why}") from None
    return ((f"{task}/{split}:{i}", row) for i, row in enumerate(rows, 1))


def read_folder(folder: Path, source: Source, max_row_chars: int) -> Read:
    """A folder that `datasets` saved, or one that holds data files (read in the order of their names)."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        return of_dataset(datasets.load_from_disk(str(folder)), source, folder.name)
    files = sorted(
        p for p in folder.iterdir() if p.is_file() and suffix(p) in READERS and p.name != "dataset_info.json"
    )
    if not files:
        raise RecipeError(
            f"the folder {folder} holds no rows: no {', '.join(sorted(READERS))} file, and no saved data set"
        )
    return (found for path in files for found in read_file(path, max_row_chars))


def read_hub(source: Source) -> Read:
    """A data set of the hub, or of its cache when offline. Code that comes with a data set is never run."""
    import datasets

    path, split = str(source.path), source.split
    try:
        found = (
            datasets.load_dataset(path, source.name)
            if split is None
            else datasets.load_dataset(path, source.name, split=split)
        )
    except Exception as why:  # anything from a network error to a wrong split; each says what is wrong
        reason = str(why).strip().split("\n", 1)[0]
        near = did_you_mean(path, sorted(p.name for p in Path().iterdir()))
        raise RecipeError(
            f"'{path}' is no file here{near} and no data set that could be loaded: {reason}"
        ) from None
    return of_dataset(found, source, path)


def of_dataset(found: Any, source: Source, label: str) -> Read:
    """Rows of a Dataset, or of one split of a DatasetDict; a class label gets its name beside it
    (`label_name`).
    """
    if hasattr(found, "keys"):
        split = source.split or (
            "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
        )
        if split not in found:
            raise RecipeError(f"{label} has no split '{split or 'train'}' (there is: {', '.join(found)})")
        found = found[split]
    classes = {k: f.names for k, f in found.features.items() if hasattr(f, "int2str")}
    for i, row in enumerate(found, 1):
        value = row.get("label")
        named = (
            {"label_name": classes["label"][value]}
            if "label" in classes and value is not None and value >= 0
            else {}
        )
        yield f"{label}:{i}", {**row, **named}


# ---------------------------------------------------------------------------------------------- writing, splitting


def write_quarantine(bad: list[dict], path: str | Path) -> None:
    """Add bad rows to a jsonl file, each once. The file is replaced whole, so that a kill leaves the old or
    the new.
    """
    path = Path(path)
    if not bad:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = dict.fromkeys([*before, *(json.dumps(b) for b in bad)])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text("".join(f"{line}\n" for line in lines if line), encoding="utf-8")
    os.replace(beside, path)


def content_key(row: dict) -> str:
    """What makes two rows the same question: the prompt, or where there is none the text, white space evened
    out.
    """
    asked = row.get("prompt") or row.get("completions") or ""
    said = (
        asked
        if isinstance(asked, str)
        else json.dumps(asked, sort_keys=True, ensure_ascii=False, default=repr)
    )
    return " ".join(said.split())


def drawn(said: str) -> float:
    """A number from 0 to 1 that follows from a text, alike on every machine."""
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") / 2**64


def split(rows: list[dict], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, held out): about `share` of the rows held out, by a hash of their content key.

    The same prompt is never on both sides, and a row stays on its side when others come or go. Where the hash
    would leave one side empty, the row nearest to it goes there.
    """
    if not 0 <= share < 1:
        raise RecipeError(f"the share held out must be at least 0 and below 1, not {share}")
    keys = [content_key(row) for row in rows]
    place = {key: drawn(f"{seed}\n{key}") for key in set(keys)}
    held = {k for k, p in place.items() if p < share}
    if share and len(place) > 1 and len(held) in (0, len(place)):
        held ^= {(max if held else min)(place, key=lambda k: place[k])}
    train = [row for row, k in zip(rows, keys, strict=True) if k not in held]
    return train, [row for row, k in zip(rows, keys, strict=True) if k in held]
