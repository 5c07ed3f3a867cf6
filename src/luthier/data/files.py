"""Files to raw rows, one at a time and with their place: jsonl, json, csv, tsv, txt and parquet, gzipped or
not.

A line that cannot be read is a `BadLine`, never an exception; only a file that is no such file at all is
refused.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.recognise import matching_formats
from luthier.errors import RecipeError
from luthier.registry import did_you_mean

CHUNK = 4000  # characters of running text that make one row of a .txt file
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SURROGATES = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as "surrogateescape" decodes them
NEXT_OBJECT = re.compile(r"\}\s*,\s*(?=\{)")
SEPARATORS = re.compile(r"[\s,]*")


@dataclass
class BadLine:
    """A row that could not even be read."""

    reason: str
    raw: Any


RawRows = Iterator[tuple[str, "dict | BadLine"]]  # (place, row)


def file_kind(path: Path) -> str:
    """What kind of file: '.jsonl' of rows.jsonl and of rows.jsonl.gz."""
    if path.suffix == ".gz":
        path = Path(path.stem)
    return path.suffix.lower()


def read_file(path: Path, max_row_chars: int) -> RawRows:
    """Rows of one file. Raises RecipeError for a kind of file that is not known, and for one that is no text
    at all.
    """
    kind = file_kind(path)
    if kind not in READERS:
        raise RecipeError(f"{path}: this file type is not supported{did_you_mean(kind, READERS)}")
    if kind != ".parquet":
        refuse_utf16(path)
    try:
        yield from READERS[kind](path, max_row_chars)
    except (OSError, EOFError, zlib.error) as why:
        raise RecipeError(f"{path} could not be read completely: {why}") from None


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A file's bytes, unpacked."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return open(path, "rb")


def refuse_utf16(path: Path) -> None:
    """UTF-16 would read as nothing but NUL bytes: the error says how to convert it."""
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except (OSError, EOFError, zlib.error):
        return  # the reader meets the same error and reports it
    if head[:2] in UTF16 or head.count(0) > 0.3 * max(len(head), 1):
        raise RecipeError(
            f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path.name} >"
            f" utf8_{path.name}"
        )


def check_object(value: Any) -> dict | BadLine:
    """A parsed value that must be an object with columns."""
    if not isinstance(value, dict):
        return BadLine("not a JSON object", value)
    return value


def decode_line(line: bytes, offset: int) -> str | BadLine:
    """A line's text; where it is not UTF-8, which byte of the file is not."""
    try:
        return line.decode()
    except UnicodeDecodeError as why:
        return BadLine(f"not UTF-8 (0x{line[why.start]:02x} at byte {offset + why.start} of the file)", line)


def too_long(max_row_chars: int) -> str:
    """The reason of a row that is too long."""
    return f"longer than {max_row_chars:,} characters (max_row_chars)"


# ---------------------------------------------------------------------------------------------- JSON


def read_jsonl(path: Path, max_row_chars: int) -> RawRows:
    """One JSON object a line, read as bytes, so that no line can end the file."""
    offset = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            start = offset
            offset += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path.name}:{number}", parse_line(line, start, max_row_chars)


def parse_line(line: bytes, offset: int, max_row_chars: int) -> dict | BadLine:
    """One line of JSON. offset: the line's first byte in its file."""
    if len(line) > 6 * max_row_chars:  # \uXXXX: six bytes a character
        return BadLine(too_long(max_row_chars), line[:2000])
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


def read_json(path: Path, max_row_chars: int) -> RawRows:
    """A list of objects, an object that holds one (`data`, `rows`, ...), or in truth one object a line."""
    with open_bytes(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        yield from read_json_list(path, content)
        return
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        yield from read_jsonl(path, max_row_chars)
        return
    for i, row in enumerate(inner_list(value), 1):
        yield f"{path.name}:{i}", check_object(row)


def inner_list(value: Any) -> list:
    """The list of objects that an object holds, or the object as the only row."""
    # One row may itself hold a list of objects: its turns.
    if isinstance(value, dict) and not matching_formats(value):
        for inner in value.values():
            if isinstance(inner, list) and inner and isinstance(inner[0], dict):
                return inner
    return [value]


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


# ------------------------------------------------------------------------------------------ tables and text


def read_csv(path: Path, max_row_chars: int) -> RawRows:
    """Comma-separated rows under a header. A quote that never closes costs its own line, not the file."""
    with open_bytes(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    csv.field_size_limit(max(csv.field_size_limit(), max_row_chars))
    place, offset, header = 0, 0, None
    while place < len(lines):
        feed = CsvLines(lines, place, 4 * max_row_chars)
        problem = ""
        cells = None
        try:
            cells = next(csv.reader(feed, strict=True), None)
        except csv.Error:
            problem, feed.place = "a quotation mark is not closed", place + 1
        where = f"{path.name}:{place + 1}"
        raw = b"".join(lines[place : feed.place])
        start, offset, place = offset, offset + len(raw), feed.place
        if problem:
            yield where, BadLine(problem, raw)
        elif cells and header is None:
            header = cells
        elif cells and header is not None:
            yield where, row_of_cells(header, cells, raw, start)


class CsvLines:
    """Lines of a csv file from a place on, for one row: csv.Error where a row takes too many bytes."""

    def __init__(self, lines: list[bytes], place: int, max_bytes: int):
        self.lines, self.place, self.bytes_left = lines, place, max_bytes

    def __iter__(self) -> CsvLines:
        return self

    def __next__(self) -> str:
        if self.place >= len(self.lines):
            raise StopIteration
        line = self.lines[self.place]
        self.bytes_left -= len(line)
        if self.bytes_left < 0:
            raise csv.Error("too long")
        self.place += 1
        return line.decode("utf-8", "surrogateescape")


def row_of_cells(header: list[str], cells: list[str], raw: bytes, offset: int) -> dict | BadLine:
    """A row of cells under its names. raw, offset: its bytes and where they begin in the file."""
    text = decode_line(raw, offset)
    if isinstance(text, BadLine):
        return text
    if len(cells) != len(header):
        return BadLine(f"{len(cells)} cells, but the header has {len(header)} columns", raw)
    return dict(zip(header, cells, strict=True))


def read_tsv(path: Path, max_row_chars: int) -> RawRows:
    """Tab-separated rows, a line each under a line of names. Quotes are text, except round a whole cell."""
    header, offset = None, 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            start = offset
            offset += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            cells = [unquote(cell) for cell in text.split("\t")]
            if header is None:
                header = cells
            else:
                yield f"{path.name}:{number}", row_of_cells(header, cells, line, start)


def unquote(cell: str) -> str:
    """A cell without the quotes round all of it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def read_txt(path: Path, max_row_chars: int) -> RawRows:
    """Running text (with blank lines): chunks of about CHUNK bytes that end at a blank line. Else a row a
    line.
    """
    with open_bytes(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    running = any(not line.strip() for line in lines[:-1])
    chunk: list[bytes] = []
    first, size, offset = 1, 0, 0
    for number, line in enumerate([*lines, b""], 1):
        blank = not line.strip()
        last = number > len(lines)
        if chunk and (not running or last or (blank and size >= CHUNK)):
            text = decode_line(b"".join(chunk), offset - size)
            if isinstance(text, str):
                yield f"{path.name}:{first}", {"text": text.replace("\r\n", "\n").strip("\n")}
            else:
                yield f"{path.name}:{first}", text
            chunk, size = [], 0
        if chunk or not blank:
            first = first if chunk else number
            chunk.append(line)
            size += len(line)
        offset += len(line)


def read_parquet(path: Path, max_row_chars: int) -> RawRows:
    """The rows of a parquet file, numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except pyarrow.ArrowInvalid as why:
        raise RecipeError(f"{path} is not a valid parquet file: {why}") from None


READERS: dict[str, Callable[[Path, int], RawRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
    ".parquet": read_parquet,
}
