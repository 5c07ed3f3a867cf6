"""Tables of text to raw rows: csv and tsv, whatever separates their cells."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from luthier.data.lines import BadLine, decode_line, read_lines
from luthier.data.recognise import matching_formats
from luthier.errors import RecipeError

SEPARATORS = ",;\t|"  # of cells, the likeliest first


class TableLines:
    """Lines of a table for csv.reader, which takes as many as a row has; csv.Error where they are too long.

    What one row has taken is forgotten by `next_row`, or given back by `retry`, but for its first line.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.lines = read_lines(path)
        self.waiting: deque[tuple[int, int, bytes | BadLine]] = deque()
        self.taken: list[tuple[int, int, bytes | BadLine]] = []
        self.max_bytes = max_bytes
        self.bytes_left = max_bytes

    def __iter__(self) -> TableLines:
        return self

    def __next__(self) -> str:
        if not self.waiting:
            self.waiting.append(next(self.lines))
        line = self.waiting.popleft()
        self.taken.append(line)
        content = line[2]
        if isinstance(content, BadLine):
            raise csv.Error("too long")
        self.bytes_left -= len(content)
        if self.bytes_left < 0:
            raise csv.Error("too long")
        return content.decode("utf-8", "surrogateescape")

    def next_row(self) -> bytes:
        """Forget the row before; the first line of the next one, b"" where it is not known."""
        self.taken = []
        self.bytes_left = self.max_bytes
        if not self.waiting:
            self.waiting.extend(islice(self.lines, 1))
        content = self.waiting[0][2] if self.waiting else b""
        if isinstance(content, BadLine):
            return b""
        return content

    def retry(self) -> None:
        """Put back all lines of a row but the first: the row ends there."""
        self.waiting.extendleft(reversed(self.taken[1:]))
        self.taken = self.taken[:1]

    @property
    def raw(self) -> bytes | BadLine:
        """What the row was read from."""
        first = self.taken[0][2]
        if isinstance(first, BadLine):
            return first
        return b"".join(content for _, _, content in self.taken if isinstance(content, bytes))


def read_csv(path: Path, max_row_chars: int) -> Iterator[tuple[str, dict | BadLine]]:
    """Rows under a header, separated by commas, or by what the header is separated by. A quotation mark that
    never closes costs its own line, not the file.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_row_chars))
    lines = TableLines(path, 4 * max_row_chars)
    header: list[str] = []
    separator, spaced = ",", b""
    while True:
        first_line = lines.next_row()
        problem = ""
        cells = None
        skip_spaces = bool(spaced) and spaced in first_line
        try:
            reader = csv.reader(lines, strict=True, delimiter=separator, skipinitialspace=skip_spaces)
            cells = next(reader, None)
        except csv.Error:
            problem = "a quotation mark is not closed"
            lines.retry()
        if not lines.taken:
            return
        number, offset, _ = lines.taken[0]
        raw, where = lines.raw, f"{path.name}:{number}"
        if isinstance(raw, BadLine):
            yield where, raw
        elif not header and raw.strip():
            separator = separator_of(raw)
            header = header_of(raw, separator, path)
            if f"{separator} ".encode() in raw:  # `a, b`: quotes, too, may begin behind a space
                spaced = f'{separator} "'.encode()
        elif problem:
            yield where, BadLine(problem, raw)
        elif cells:
            yield where, row_of_cells(header, cells, raw, offset)


def separator_of(header: bytes) -> str:
    """What separates the cells of a header: what gives names that a format has, else what is there, a comma
    first.
    """
    text = header.decode("utf-8", "replace")
    present = [separator for separator in SEPARATORS if len(split_line(text, separator)) > 1]
    for separator in present:
        names = unique_names(split_line(text.lower(), separator))
        if matching_formats(names):
            return separator
    return (*present, SEPARATORS[0])[0]


def header_of(raw: bytes, separator: str, path: Path) -> list[str]:
    """The names of a table's columns: without spaces around them, those without a name numbered, repeated
    ones too. Raises RecipeError where the header is no text.
    """
    text = decode_line(raw, 0)
    if isinstance(text, BadLine):
        raise RecipeError(
            f"{path}: the header is {text.reason}; save the table as UTF-8, e.g."
            f" iconv -f LATIN1 -t UTF-8 {path.name} > utf8_{path.name}"
        )
    return unique_names(split_line(text, separator))


def split_line(line: str, separator: str) -> list[str]:
    """The cells of a line that is a row by itself."""
    line = line.rstrip("\r\n")
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return line.split(separator)


def unique_names(cells: Iterable[str]) -> list[str]:
    """Names of columns, each once: what is empty is called by its number, what is repeated gets one."""
    names: list[str] = []
    for i, cell in enumerate(cells, 1):
        name = " ".join(cell.replace("\ufeff", "").split()) or f"column_{i}"
        while name in names:
            name = f"{name}_{i}"
        names.append(name)
    return names


def row_of_cells(header: list[str], cells: list[str], raw: bytes, offset: int) -> dict | BadLine:
    """A row of cells under its names. raw, offset: its bytes and where they begin in the file."""
    text = decode_line(raw, offset)
    if isinstance(text, BadLine):
        return text
    if len(cells) != len(header):
        return BadLine(f"{len(cells)} cells, but the header has {len(header)} columns", raw)
    return dict(zip(header, cells, strict=True))


def read_tsv(path: Path, max_row_chars: int) -> Iterator[tuple[str, dict | BadLine]]:
    """Tab-separated rows, a line each under a line of names. Quotes are text, except round a whole cell. A
    file without a tab in its header is read as csv.
    """
    header: list[str] = []
    for number, offset, line in read_lines(path):
        where = f"{path.name}:{number}"
        if isinstance(line, BadLine):
            yield where, line
            continue
        if not line.strip():
            continue
        if not header and b"\t" not in line and separator_of(line).encode() in line:
            yield from read_csv(path, max_row_chars)
            return
        if not header:
            header = header_of(line, "\t", path)
            continue
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        cells = list(map(unquote, text.split("\t")))
        yield where, row_of_cells(header, cells, line, offset)


def unquote(cell: str) -> str:
    """A cell without the quotes round all of it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell
