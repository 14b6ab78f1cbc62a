"""Records of tables: the rows of CSV and TSV files, found by byte offset as those of JSON files are."""

from __future__ import annotations

import csv
import io
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .records import JSON_SUFFIXES, Records, expand
from .source import BadSample

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n?+|\n")


def open_table(path: str, cache: Path | None = None) -> Records:
    """Open a table by its ending: JSON, or else CSV or TSV."""
    return Records(path, cache) if Path(path).suffix.lower() in JSON_SUFFIXES else Rows(path, cache)


class Rows(Records):
    """Rows of one or more ``.csv`` or ``.tsv`` files as records of strings; the first line names the columns.

    A line break within a quoted field does not end a row. As in Python's csv, a quote opens a field at its start only:
    ``15" laptop`` is text like any other. Where such a field never closes, its row ends with the line, as a bad sample.

    Raises:
        ValueError: as `Records`, or a file's first line names no columns.
    """

    suffixes = (".csv", ".tsv")
    rules = "rows 2"

    def __init__(self, path: str, cache: Path | None = None) -> None:
        self._columns = [_header(file) for file in expand(path, self.suffixes)]
        super().__init__(path, cache)

    def columns(self, file: int) -> list[str]:
        """The columns of the file with this number in `paths`."""
        return self._columns[file]

    def index_of(self, path: Path) -> np.ndarray:
        """Offset and length of each row, flat; the first line and blank ones are none."""
        spans = [(start, end - start) for start, end, _ in _rows(path)]
        return np.array(spans[1:], np.int64).reshape(-1)

    def parse(self, data: bytes, file: int, where: str) -> dict[str, str]:
        """A row as a mapping."""
        columns, path = self._columns[file], self.paths[file]
        try:
            values = next(csv.reader(io.StringIO(_text(data)), delimiter=_delimiter(path), strict=True))
        except (csv.Error, StopIteration) as error:
            reason = "a quoted field never closes" if "end of data" in str(error) else f"not a row of CSV ({error})"
            raise BadSample("bad_record", f"{where}: {reason}") from error
        if len(values) != len(columns):
            raise BadSample("bad_record", f"{where}: {len(values)} values for {len(columns)} columns")
        return dict(zip(columns, values, strict=True))


def _header(path: Path) -> list[str]:
    try:
        start, end, closed = next(_rows(path), (0, 0, True))
        with path.open("rb") as file:
            file.seek(start)
            first = file.read(end - start)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if not closed:
        raise ValueError(f"{path}: a quoted name in its first line never closes: close the quote, or double it")
    try:
        names = next(csv.reader(io.StringIO(_text(first)), delimiter=_delimiter(path)), [])
    except csv.Error as error:
        raise ValueError(f"{path}: its first line is no row of CSV ({error})") from error
    if not names:
        raise ValueError(f"{path} is empty: its first line must name the columns")
    return [name.strip() for name in names]


def _rows(path: Path) -> Iterator[tuple[int, int, bool]]:
    """Start and end of each row that is not blank, the first line's included, and whether its quoted fields close."""
    size = path.stat().st_size
    if not size:
        return
    delimiter = _delimiter(path).encode()
    pattern, blanks = _row_pattern(delimiter), b" \t\r\n".replace(delimiter, b"")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = len(_BOM) if data[: len(_BOM)] == _BOM else 0
        while at < size:
            row = pattern.match(data, at)
            assert row is not None, "a row may be empty"
            closed, end = row[1] is not None, row.end()
            if not closed:  # the match ends before the quote
                line_end = _LINE_END.search(data, end)
                end = line_end.end() if line_end else size
            if data[at:end].strip(blanks):
                yield at, end, closed
            at = end


def _row_pattern(delimiter: bytes) -> re.Pattern[bytes]:
    """Fields, then the end of the row as group 1: none where a quoted field never closes."""
    rest = rb"[^" + delimiter + rb"\r\n]*+"
    field = rb'(?:"(?:[^"]++|"")*+"' + rest + rb'|(?!")' + rest + rb"|)"
    return re.compile(field + rb"(?:" + delimiter + field + rb")*+(\r\n?+|\n|\Z)?+")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")
