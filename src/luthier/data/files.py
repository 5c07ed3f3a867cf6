"""Files to raw rows, one at a time and with their place: jsonl, json, csv, tsv, txt, md and parquet, packed
(.gz, .bz2, .xz, .zst) or not.

A line that cannot be read is a `BadLine`, never an exception; only a file that is no such file at all is
refused.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from luthier.data.lines import (
    MAX_LINE,
    READ_ERRORS,
    BadLine,
    decode_line,
    file_kind,
    open_bytes,
    read_lines,
    read_parts,
    refuse_utf16,
)
from luthier.data.recognise import matching_formats
from luthier.data.tables import read_csv, read_tsv
from luthier.errors import RecipeError
from luthier.methods.formats._base import without_nulls

CHUNK = 4000  # characters of running text that make one row of a .txt file
TEXT_PART = 2**20  # bytes of the longest row of a .txt file
SURROGATES = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as "surrogateescape" decodes them
NEXT_OBJECT = re.compile(r"\}\s*,\s*(?=\{)")
SEPARATORS = re.compile(r"[\s,]*")
LIST_OF_ROWS = re.compile(rb'\[\s*\{(?!\s*"(role|from|content|value)")')  # and not one of messages
PACKERS = {
    ".zip": "unzip it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".7z": "unpack it",
    ".rar": "unpack it",
    ".lz4": "unpack it with lz4 -d",
    ".zstd": "name it .zst",
    ".xlsx": "save the sheet as .csv",
    ".xls": "save the sheet as .csv",
    ".ods": "save the sheet as .csv",
    ".yaml": "write its rows as .jsonl",
    ".yml": "write its rows as .jsonl",
    ".pkl": "a pickle can run code, so none is read; write the rows as .jsonl or .parquet",
    ".pickle": "a pickle can run code, so none is read; write the rows as .jsonl or .parquet",
    ".pt": "a pickle can run code, so none is read; write the rows as .jsonl or .parquet",
    ".npy": "write its rows as .jsonl or .parquet",
    ".pdf": "write its text as .txt",
    ".docx": "save it as .txt",
}

RawRows = Iterator[tuple[str, "dict | BadLine"]]  # (place, row)


def read_file(path: Path, max_row_chars: int, split: str | None = None) -> RawRows:
    """Rows of one file. split: which part of a .json file is read that holds several ({"train": [...], ...}).

    Raises RecipeError for a kind of file that is not known, and for one that is no text at all.
    """
    kind = file_kind(path)
    if kind not in READERS:
        raise RecipeError(f"{path}: {unsupported(path)}")
    try:
        if kind != ".parquet":
            refuse_utf16(path)
        if kind == ".json":
            yield from read_json(path, max_row_chars, split)
        else:
            yield from READERS[kind](path, max_row_chars)
    except READ_ERRORS as why:
        raise RecipeError(f"{path} could not be read completely: {why}") from None


def unsupported(path: Path) -> str:
    """Why a file of another kind is not read, and what helps."""
    kinds = f"files are read that end in {', '.join(READERS)}, packed as .gz, .bz2, .xz or .zst too"
    advice = PACKERS.get(path.suffix.lower(), "")
    if advice:
        return f"{path.suffix} files are not read; {advice} ({kinds})"
    kind = file_kind(path)
    if not kind:
        return f"the name of the file does not tell what it is ({kinds})"
    near = difflib.get_close_matches(kind, READERS, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{kind} files are not read{hint} ({kinds})"


def check_object(value: Any) -> dict | BadLine:
    """A parsed value that must be an object with columns; a list of messages is a conversation."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(map(is_message, value)):
        return {"messages": value}
    return BadLine("not a JSON object", value)


def is_message(value: Any) -> bool:
    """Whether a value has the keys of a message."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def too_long(max_row_chars: int) -> str:
    """The reason of a row that is too long."""
    return f"longer than {max_row_chars:,} characters (max_row_chars)"


# ---------------------------------------------------------------------------------------------- JSON


def read_jsonl(path: Path, max_row_chars: int) -> RawRows:
    """One JSON object a line, read as bytes, so that no line can end the file. A JSON list, or an object over
    several lines, is read as .json is.
    """
    first = True
    for number, offset, line in read_lines(path):
        where = f"{path.name}:{number}"
        if isinstance(line, BadLine):
            yield where, line
        elif line.strip():
            if first and opens_value(line):
                yield from read_json(path, max_row_chars)
                return
            first = False
            yield where, parse_line(line, offset)


def opens_value(line: bytes) -> bool:
    """Whether a line opens a JSON list of rows, or an object that ends on another line."""
    line = line.strip()
    return line in (b"[", b"{") or bool(LIST_OF_ROWS.match(line))


def parse_line(line: bytes, offset: int) -> dict | BadLine:
    """One line of JSON. offset: the line's first byte in its file."""
    text = decode_line(line, offset)
    if isinstance(text, BadLine):
        return text
    if "\0" in text:
        return BadLine("contains a NUL byte", text)
    try:
        return check_object(json.loads(text))
    except RecursionError:
        return BadLine("JSON is nested too deeply", text)
    except json.JSONDecodeError as why:
        truncated = why.pos >= len(text.rstrip()) or why.msg.startswith("Unterminated")
        return BadLine("truncated JSON" if truncated else "not JSON", text)
    except ValueError:
        return BadLine("not JSON", text)


def read_json(path: Path, max_row_chars: int, split: str | None = None) -> RawRows:
    """A list of objects, an object that holds one (`data`, `rows`, ...), columns of lists, or in truth one
    object a line.
    """
    with open_bytes(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        yield from read_json_list(path, content)
        return
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        yield from read_objects(path, content)
        return
    for i, row in enumerate(rows_of_object(value, split, str(path)), 1):
        yield f"{path.name}:{i}", check_object(row)


def read_objects(path: Path, content: bytes) -> RawRows:
    """Objects one after the other: one a line, or over several lines each."""
    lines = [line for line in content.split(b"\n", 99) if line.strip()]
    if lines and opens_value(lines[0]):
        yield from read_json_list(path, b"[" + content)
        return
    offset = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if len(line) > MAX_LINE:
            yield f"{path.name}:{number}", BadLine(f"a line longer than {MAX_LINE // 2**20} MB", line[:2000])
        elif line.strip():
            yield f"{path.name}:{number}", parse_line(line, offset)
        offset += len(line)


def rows_of_object(value: Any, split: str | None, label: str) -> Iterable[Any]:
    """The rows that a JSON object holds: a list of objects under some key, splits under their names, columns
    as lists or as {"0": cell, ...}, pandas' {"columns": ..., "data": ...}; else it is itself the only row.
    """
    # One row may itself hold a list of objects: its turns.
    if not isinstance(value, dict) or is_single_row(value):
        return [value]
    names, cells = value.get("columns"), value.get("data")
    if is_list_of(names, str) and is_list_of(cells, list):
        return [dict(zip(names, row, strict=False)) for row in cells]
    if len(value) > 1 and all(is_list_of(rows, dict) for rows in value.values()):
        return value[choose_split(value, split, label)]
    for inner in value.values():
        if is_list_of(inner, dict):
            return inner
    columns = {}
    for name, column in value.items():
        columns[name] = list(column.values()) if isinstance(column, dict) else column
    if columns and all(isinstance(column, list) for column in columns.values()):
        if len(set(map(len, columns.values()))) == 1:
            return rows_of_columns(columns)
    return [value]


def is_list_of(value: Any, kind: type) -> TypeGuard[list]:
    """Whether a value is a list that is not empty, of values of a kind, by its first."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def is_single_row(value: dict) -> bool:
    """Whether an object is a row, by its columns, and not a table of such columns."""
    formats = matching_formats(value)
    if not formats:
        return False
    names: set[str] = set()
    for shape in formats[0].columns:
        if value.keys() >= set(shape.split()):
            names.update(shape.split())
    read = [value[name] for name in names]
    if all(isinstance(cells, dict) and "0" in cells for cells in read):
        return False
    return not all(isinstance(cells, list) and cells and not isinstance(cells[0], dict) for cells in read)


def rows_of_columns(columns: Mapping[str, list]) -> Iterator[dict]:
    """The rows of a table given by its columns."""
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))


def choose_split(splits: Iterable[str], split: str | None, label: str) -> str:
    """The split to read: the one that is named, `train`, or the only one. Raises RecipeError."""
    names = list(map(str, splits))
    if split is None and "train" in names:
        return "train"
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        raise RecipeError(f"{label} has no split '{split or 'train'}' (there is: {', '.join(names)})")
    return split


def read_json_list(path: Path, content: bytes) -> RawRows:
    """The objects of a JSON list, one after the other; after a broken one, from the next that begins."""
    text = content.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()
    line, counted = 1, 0  # lines are counted up to `counted`
    position = text.index("[") + 1
    while True:
        position = SEPARATORS.match(text, position).end()  # type: ignore[union-attr]
        if position >= len(text) or text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path.name}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
            yield where, invalid_utf8(text, position, end) or check_object(value)
        except (ValueError, RecursionError):
            following = NEXT_OBJECT.search(text, position)
            end = following.end() if following else len(text)
            reason = "not JSON" if following else "truncated JSON"
            yield where, BadLine(reason, original_bytes(text[position : position + 500]))
        position = end


def invalid_utf8(text: str, start: int, end: int) -> BadLine | None:
    """Whether a part of a text decoded with surrogate escapes is not UTF-8, and at which byte of the file."""
    part = text[start:end]
    if part.isascii():
        return None
    escape = SURROGATES.search(part)
    if escape is None:
        return None
    offset = len(original_bytes(text[: start + escape.start()]))
    reason = f"not UTF-8 (0x{ord(escape[0]) - 0xDC00:02x} at byte {offset} of the file)"
    return BadLine(reason, original_bytes(part))


def original_bytes(text: str) -> bytes:
    """The bytes that were decoded with surrogate escapes."""
    return text.encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------- text and parquet


def read_txt(path: Path, max_row_chars: int) -> RawRows:
    """Running text (with blank lines): chunks of about CHUNK bytes that end at a blank line. Else a row a
    line; no row is longer than TEXT_PART bytes.
    """
    running = is_running_text(path)
    chunk: list[bytes] = []
    first = start = size = 0
    for number, offset, line in read_parts(path, TEXT_PART):
        blank = not line.strip()
        full = not running or size >= TEXT_PART or (blank and size >= CHUNK)
        if chunk and full:
            yield f"{path.name}:{first}", text_row(chunk, start)
            chunk, size = [], 0
        if chunk or not blank:
            if not chunk:
                first, start = number, offset
            chunk.append(line)
            size += len(line)
    if chunk:
        yield f"{path.name}:{first}", text_row(chunk, start)


def is_running_text(path: Path) -> bool:
    """Whether a text has blank lines between others."""
    blank = False
    for _, _, line in read_parts(path, TEXT_PART):
        if blank:
            return True
        blank = not line.strip()
    return False


def text_row(chunk: list[bytes], offset: int) -> dict | BadLine:
    """A row of running text. offset: its first byte in the file."""
    text = decode_line(b"".join(chunk), offset)
    if isinstance(text, BadLine):
        return text
    return {"text": text.replace("\r\n", "\n").strip("\n")}


def read_parquet(path: Path, max_row_chars: int) -> RawRows:
    """The rows of a parquet file, numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_bytes(path) as file:
            if file_kind(path) != path.suffix.lower():  # packed: parquet is read from its end
                file = pyarrow.BufferReader(file.read())
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for row in rows_of_batch(batch):
                    number += 1
                    yield f"{path.name}:{number}", without_nulls(row)
    except pyarrow.ArrowException as why:
        raise RecipeError(f"{path} is not a valid parquet file: {why}") from None


def rows_of_batch(batch: Any) -> Iterator[dict | BadLine]:
    """The rows of a batch; where a cell cannot be read (text that is no UTF-8, a date out of range), row by
    row.
    """
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError) as why:
            yield BadLine(f"a cell cannot be read: {str(why)[:100]}", "")


READERS: dict[str, Callable[[Path, int], RawRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
    ".md": read_txt,
    ".parquet": read_parquet,
}
