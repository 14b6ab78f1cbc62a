"""Long lists on little memory: strings in one block, and the rows of CSV and JSON-lines files reached by seeking."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .source import BadSample, OpenFiles, parse_json


class Strings:
    """Strings by number in one block of bytes: about their length plus 8 bytes each, and not copied by fork."""

    def __init__(self, values: Sequence[str]) -> None:
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        self._ends = np.fromiter(accumulate(map(len, parts), initial=0), dtype=np.int64, count=len(parts) + 1)
        self._block = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} is out of range: there are {len(self)}")
        return self._block[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class Table:
    """Rows of a ``.csv``, ``.tsv`` or ``.jsonl`` file as dictionaries; only where each row starts is kept in memory.

    Raises:
        ValueError: the file cannot be read, or a CSV file has no header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._files = OpenFiles(1)
        try:
            self._starts = self._index()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        self.columns: list[str] = []
        if not self.is_json:
            header = self._line(0) if len(self._starts) > 1 else ""
            try:
                names = next(csv.reader(io.StringIO(header), delimiter=self.delimiter), [])
            except csv.Error as error:
                raise ValueError(f"{path}: its first line is no row of CSV ({error})") from error
            self.columns = [name.strip() for name in names]
            if not self.columns:
                raise ValueError(f"{path} is empty: its first line must name the columns")

    def _index(self) -> np.ndarray:
        """Offsets ``(rows + 1,)`` of the rows; a line break within quotes of a CSV file does not end its row."""
        starts, at, quoted = [0], 0, False
        with self.path.open("rb") as file:
            for line in file:
                at += len(line)
                if not self.is_json and line.count(b'"') % 2:
                    quoted = not quoted
                if quoted:
                    continue
                if line.strip():
                    starts.append(at)
                else:
                    starts[-1] = at  # blank lines belong to no row
        if quoted and at > starts[-1]:
            starts.append(at)
        return np.asarray(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1 - (0 if self.is_json else 1)

    def _line(self, number: int) -> str:
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        return self._files.read(self.path, start, end - start).decode("utf-8-sig", "replace")

    def row(self, number: int) -> dict[str, Any]:
        """Return a row; the values of a CSV file are strings.

        Raises:
            IndexError: the number is out of range.
            BadSample: bad_json, bad_record.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} is out of range: {self.path.name} has {len(self)}")
        where = f"{self.path.name} row {number + 1}"
        if self.is_json:
            record = parse_json(self._line(number), where)
            if not isinstance(record, dict):
                raise BadSample("bad_record", f"{where}: {type(record).__name__} where a mapping is expected")
            return record
        try:
            values = next(csv.reader(io.StringIO(self._line(number + 1)), delimiter=self.delimiter, strict=True))
        except (csv.Error, StopIteration) as error:
            raise BadSample("bad_record", f"{where}: not a row of CSV ({error})") from error
        if len(values) != len(self.columns):
            raise BadSample("bad_record", f"{where}: {len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values, strict=True))
