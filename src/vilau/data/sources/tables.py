"""Records of tables: the rows of CSV and TSV files, found by byte offset as those of JSON files are."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from .records import JSON_SUFFIXES, Records, expand
from .source import BadSample


def open_table(path: str, cache: Path | None = None) -> Records:
    """Open a table by its ending: JSON, or else CSV or TSV."""
    return Records(path, cache) if Path(path).suffix.lower() in JSON_SUFFIXES else Rows(path, cache)


class Rows(Records):
    """Rows of one or more ``.csv`` or ``.tsv`` files as records of strings; the first line names the columns.

    A line break within quotes does not end a row.

    Raises:
        ValueError: as `Records`, or a file's first line names no columns.
    """

    suffixes = (".csv", ".tsv")
    rules = "rows"

    def __init__(self, path: str, cache: Path | None = None) -> None:
        self._columns = [_header(file) for file in expand(path, self.suffixes)]
        super().__init__(path, cache)

    def columns(self, file: int) -> list[str]:
        """The columns of the file with this number in `paths`."""
        return self._columns[file]

    def index_of(self, path: Path) -> np.ndarray:
        """Offset and length of each row, flat; the first line and blank ones are none."""
        spans: list[tuple[int, int]] = []
        start, at, quoted = 0, 0, False
        with path.open("rb") as file:
            for line in file:
                at += len(line)
                if line.count(b'"') % 2:
                    quoted = not quoted
                if quoted:
                    continue
                if line.strip():
                    spans.append((start, at - start))
                start = at
        if quoted and at > start:
            spans.append((start, at - start))
        return np.array(spans[1:], np.int64).reshape(-1)

    def parse(self, data: bytes, file: int, where: str) -> dict[str, str]:
        """A row as a mapping."""
        columns = self._columns[file]
        try:
            values = next(csv.reader(io.StringIO(_text(data)), delimiter=_delimiter(self.paths[file]), strict=True))
        except (csv.Error, StopIteration) as error:
            raise BadSample("bad_record", f"{where}: not a row of CSV ({error})") from error
        if len(values) != len(columns):
            raise BadSample("bad_record", f"{where}: {len(values)} values for {len(columns)} columns")
        return dict(zip(columns, values, strict=True))


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
            while first.count(b'"') % 2 and (more := next(file, b"")):
                first += more
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        names = next(csv.reader(io.StringIO(_text(first)), delimiter=_delimiter(path)), [])
    except csv.Error as error:
        raise ValueError(f"{path}: its first line is no row of CSV ({error})") from error
    if not names:
        raise ValueError(f"{path} is empty: its first line must name the columns")
    return [name.strip() for name in names]


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")
