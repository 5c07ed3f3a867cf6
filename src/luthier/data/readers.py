"""Files to raw rows, one at a time and with their place: jsonl, json, csv, tsv, txt and parquet, gzipped or
not.

A line that cannot be read is a `Bad`, never an exception; only a file that is no such file at all is refused.
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

from luthier.errors import RecipeError
from luthier.methods.formats._base import fitting
from luthier.registry import did_you_mean

PIECE = 4000  # characters of running text that make one row of a .txt file
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass
class Bad:
    """A row that could not even be read."""

    reason: str
    raw: Any


Read = Iterator[tuple[str, "dict | Bad"]]  # (place, row)


def over(max_row_chars: int) -> str:
    """The reason of a row that is too long."""
    return f"over {max_row_chars:,} characters (max_row_chars)"


def suffix(path: Path) -> str:
    """What kind of file: '.jsonl' of rows.jsonl and of rows.jsonl.gz."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def read_file(path: Path, max_row_chars: int) -> Read:
    """Rows of one file. Raises RecipeError for a kind of file that is not known, and for one that is no text
    at all.
    """
    kind = suffix(path)
    if kind not in READERS:
        raise RecipeError(f"{path} is of no kind that is read here{did_you_mean(kind, READERS)}")
    if kind != ".parquet":
        refuse_utf16(path)
    try:
        yield from READERS[kind](path, max_row_chars)
    except (OSError, EOFError, zlib.error) as why:
        raise RecipeError(f"{path} cannot be read to its end: {why}") from None


def binary(path: Path) -> io.BufferedIOBase:
    """A file's bytes, unpacked."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def refuse_utf16(path: Path) -> None:
    """UTF-16 would read as nothing but NUL bytes: say how to convert it."""
    try:
        with binary(path) as file:
            head = file.read(4096)
    except (OSError, EOFError, zlib.error):
        return  # told by the reader
    if head[:2] in UTF16 or head.count(0) > 0.3 * max(len(head), 1):
        raise RecipeError(
            f"{path} is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8 {path.name} >"
            f" utf8_{path.name}"
        )


def objected(value: Any) -> dict | Bad:
    """A row, or the complaint that it is none."""
    return value if isinstance(value, dict) else Bad("no object with columns", value)


def decoded(line: bytes, offset: int) -> str | Bad:
    """A line's text; where it is not UTF-8, which byte of the file is not."""
    try:
        return line.decode()
    except UnicodeDecodeError as why:
        return Bad(f"not UTF-8 (0x{line[why.start]:02x} at byte {offset + why.start} of the file)", line)


def read_jsonl(path: Path, max_row_chars: int) -> Read:
    """One JSON object a line, read as bytes, so that no line can end the file."""
    offset = 0
    with binary(path) as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{path.name}:{number}", parsed_line(line, start, max_row_chars)


def parsed_line(line: bytes, offset: int, max_row_chars: int) -> dict | Bad:
    """One line of JSON."""
    if len(line) > 6 * max_row_chars:  # \uXXXX: six bytes a character
        return Bad(over(max_row_chars), line[:2000])
    said = decoded(line, offset)
    if isinstance(said, Bad):
        return said
    if "\0" in said:
        return Bad("holds a NUL byte", said)
    try:
        value = json.loads(said)
    except RecursionError:
        return Bad("JSON nested too deep", said)
    except ValueError as why:
        end = len(said.rstrip())
        short = isinstance(why, json.JSONDecodeError) and (
            why.pos >= end or why.msg.startswith("Unterminated")
        )
        return Bad("truncated JSON" if short else "not JSON", said)
    return objected(value)


def read_json(path: Path, max_row_chars: int) -> Read:
    """A list of objects, an object that holds one (`data`, `rows`, ...), or in truth one object a line."""
    with binary(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            yield from read_jsonl(path, max_row_chars)
            return
        # One row may itself hold a list of objects: its turns.
        inside = value.values() if isinstance(value, dict) and not fitting(value) else ()
        rows = next((v for v in inside if isinstance(v, list) and v and isinstance(v[0], dict)), [value])
        yield from ((f"{path.name}:{i}", objected(r)) for i, r in enumerate(rows, 1))
    else:
        yield from listed(path, data)


def listed(path: Path, data: bytes) -> Read:
    """The objects of a JSON list, one after the other; after a broken one, from the next that begins."""
    said = data.decode("utf-8", "surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, number, line, counted = said.index("[") + 1, 0, 1, 0
    while (place := space.match(said, place).end()) < len(said) and said[place] != "]":
        number += 1
        line, counted = line + said.count("\n", counted, place), place
        where = f"{path.name}:{line}"
        try:
            value, end = decoder.raw_decode(said, place)
            bad = escaped(said[place:end], said, place)
            yield where, bad or objected(value)
        except (ValueError, RecursionError):
            following = re.compile(r"\}\s*,\s*(?=\{)").search(said, place)
            end = following.end() if following else len(said)
            yield (
                where,
                Bad("not JSON" if following else "truncated JSON", raw_bytes(said[place : place + 500])),
            )
        place = end


def escaped(part: str, said: str, place: int) -> Bad | None:
    """Whether a part that was decoded with surrogate escapes is not UTF-8, and at which byte of the file."""
    if part.isascii() or not (found := re.search("[\udc80-\udcff]", part)):
        return None
    before = len(raw_bytes(said[: place + found.start()]))
    return Bad(f"not UTF-8 (0x{ord(found[0]) - 0xDC00:02x} at byte {before} of the file)", raw_bytes(part))


def raw_bytes(said: str) -> bytes:
    """The bytes that were decoded with surrogate escapes."""
    return said.encode("utf-8", "surrogateescape")


def read_csv(path: Path, max_row_chars: int) -> Read:
    """Comma-separated rows under a line of names. A quote that never closes costs its own line, not the file."""
    with binary(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    csv.field_size_limit(max(csv.field_size_limit(), max_row_chars))
    place, header, offset = 0, None, 0
    while place < len(lines):
        feed = Feed(lines, place, 4 * max_row_chars)
        try:
            cells = next(csv.reader(feed, strict=True), None)
            problem = None
        except csv.Error:
            cells, problem, feed.place = None, "a quote is not closed", place + 1
        where, raw, start = f"{path.name}:{place + 1}", b"".join(lines[place : feed.place]), offset
        place, offset = feed.place, offset + len(raw)
        if problem:
            yield where, Bad(problem, raw)
        elif not cells:
            continue
        elif header is None:
            header = cells
        else:
            yield where, celled(header, cells, raw, start)


class Feed:
    """Lines of a csv file from a place on, for one row: stops with an error where a row takes too many bytes."""

    def __init__(self, lines: list[bytes], place: int, most: int):
        self.lines, self.place, self.left = lines, place, most

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> str:
        if self.place >= len(self.lines):
            raise StopIteration
        self.left -= len(self.lines[self.place])
        if self.left < 0:
            raise csv.Error("too long")
        self.place += 1
        return self.lines[self.place - 1].decode("utf-8", "surrogateescape")


def celled(header: list[str], cells: list[str], raw: bytes, offset: int) -> dict | Bad:
    """A row of cells under its names; an empty cell counts as missing only where its text would be."""
    said = decoded(raw, offset)
    if isinstance(said, Bad):
        return said
    if len(cells) != len(header):
        return Bad(f"{len(cells)} cells under {len(header)} names", raw)
    return dict(zip(header, cells, strict=True))


def read_tsv(path: Path, max_row_chars: int) -> Read:
    """Tab-separated rows, a line each under a line of names. Quotes are text, except round a whole cell."""
    header, offset = None, 0
    with binary(path) as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            cells = [unquoted(c) for c in line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")]
            if header is None:
                header = cells
            else:
                yield f"{path.name}:{number}", celled(header, cells, line, start)


def unquoted(cell: str) -> str:
    """A cell without the quotes round all of it."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def read_txt(path: Path, max_row_chars: int) -> Read:
    """Running text (with blank lines): pieces of about PIECE characters that end at a blank line. Else a row
    a line.
    """
    with binary(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    running = any(not line.strip() for line in lines[:-1])
    piece, first, size, offset = [], 1, 0, 0
    for number, line in enumerate([*lines, b""], 1):
        blank = not line.strip()
        if piece and (not running or number > len(lines) or (blank and size >= PIECE)):
            raw = b"".join(piece)
            said = decoded(raw, offset - len(raw))
            yield (
                f"{path.name}:{first}",
                (said if isinstance(said, Bad) else {"text": said.replace("\r\n", "\n").strip("\n")}),
            )
            piece, size = [], 0
        if piece or not blank:
            first = first if piece else number
            piece.append(line)
            size += len(line)
        offset += len(line)


def read_parquet(path: Path, max_row_chars: int) -> Read:
    """The rows of a parquet file, numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except pyarrow.ArrowInvalid as why:
        raise RecipeError(f"{path} is no parquet file: {why}") from None


READERS: dict[str, Callable[[Path, int], Read]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
    ".parquet": read_parquet,
}
