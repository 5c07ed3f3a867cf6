"""Bytes of a file, unpacked, and its lines: both bounded, so that no file can fill the memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from luthier.errors import RecipeError

MAX_LINE = 32 * 2**20  # bytes of a line that is read at all
SHOWN = 2000  # bytes that are kept of a longer one
PART = 2**20  # bytes that are read at a time of what is skipped
UNPACKED = 256 * 2**20  # bytes to which any packed file may grow
MAX_RATIO = 200  # how many times its size a packed file may grow beyond that; text rarely reaches 20
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass
class BadLine:
    """A row that could not even be read."""

    reason: str
    raw: Any


def open_zstd(path: Path) -> Any:
    """A zstd file's bytes; pyarrow unpacks them."""
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of files that are damaged or torn


class Unpacked(io.RawIOBase):
    """The bytes of a packed file; RecipeError where they are far more than any text would unpack to."""

    def __init__(self, source: Any, path: Path):
        self.source, self.path, self.total = source, path, 0
        self.most = max(UNPACKED, MAX_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.source.read(len(buffer))
        buffer[: len(part)] = part
        self.total += len(part)
        if self.total > self.most:
            raise RecipeError(
                f"{self.path} unpacks to more than {self.most // 2**20:,} MB, which is over {MAX_RATIO} times"
                " its size: this is no text; if it is meant, unpack it first"
            )
        return len(part)

    def close(self) -> None:
        self.source.close()
        super().close()


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, unpacked. Raises RecipeError for what is no plain file: reading a pipe or a device may
    never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise RecipeError(f"{path} is a pipe, a socket or a device; write its rows to a file")
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        return open(path, "rb")
    return io.BufferedReader(Unpacked(opener(path), path), PART)


def file_kind(path: Path) -> str:
    """What kind of file: '.jsonl' of rows.jsonl and of rows.jsonl.gz."""
    if path.suffix.lower() in OPENERS:
        path = Path(path.stem)
    return path.suffix.lower()


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes | BadLine]]:
    """(number from 1, first byte, line) of a file, without its byte order mark; of a line that is longer than
    MAX_LINE only the beginning, as a bad one.
    """
    with open_bytes(path) as file:
        yield from lines_of(file)


def lines_of(file: BinaryIO) -> Iterator[tuple[int, int, bytes | BadLine]]:
    """As `read_lines`, of a file that is open."""
    number = offset = 0
    while line := file.readline(MAX_LINE):
        number += 1
        start = offset
        offset += len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if offset - start < MAX_LINE or line.endswith(b"\n"):
            yield number, start, line
            continue
        yield number, start, BadLine(f"a line longer than {MAX_LINE // 2**20} MB", line[:SHOWN])
        while part := file.readline(PART):
            offset += len(part)
            if part.endswith(b"\n"):
                break


def read_parts(path: Path, size: int) -> Iterator[tuple[int, int, bytes]]:
    """(line number, first byte, part) of a file of running text: its lines, those of more than `size` bytes
    in parts that end behind a space, or else behind a whole character.
    """
    number, offset, rest = 1, 0, b""
    with open_bytes(path) as file:
        while True:
            read = file.readline(size - len(rest))
            part, rest = rest + read, b""
            if not part:
                return
            if read and not part.endswith(b"\n") and len(part) >= size:
                end = part.rfind(b" ") + 1 or character_end(part)
                part, rest = part[:end], part[end:]
            start = offset
            offset += len(part)
            if start == 0:
                part = part.removeprefix(codecs.BOM_UTF8)
            yield number, start, part
            number += part.endswith(b"\n")


def character_end(part: bytes) -> int:
    """Where the last whole character of some bytes of UTF-8 ends."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(part)
    unfinished, _ = decoder.getstate()
    return len(part) - len(unfinished)


def decode_line(line: bytes, offset: int) -> str | BadLine:
    """A line's text; where it is not UTF-8, which byte of the file is not."""
    try:
        return line.decode()
    except UnicodeDecodeError as why:
        return BadLine(f"not UTF-8 (0x{line[why.start]:02x} at byte {offset + why.start} of the file)", line)


def refuse_utf16(path: Path) -> None:
    """UTF-16 would read as nothing but NUL bytes: the error says how to convert it."""
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except READ_ERRORS:
        return  # the reader meets the same error and reports it
    if head[:2] in UTF16 or head.count(0) > 0.3 * max(len(head), 1):
        raise RecipeError(
            f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path.name} >"
            f" utf8_{path.name}"
        )
