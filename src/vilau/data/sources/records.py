"""Records of JSON lists and JSONL files, each reached by its byte offset.

The first opening of a file reads it once from front to back and writes an index of two numbers of 8 bytes per record
beside it; later ones map that index. No file is ever held in memory, a JSON list of gigabytes no more than the same as
JSONL: ``read`` parses one record.
"""

from __future__ import annotations

import json
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .index_files import NumberFile, kept_numbers
from .paths import find_files
from .source import BadSample, OpenFiles, parse_json

# A string, a bracket, or a quote that never closes; what lies between them cannot begin or end a record.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|"', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,]++")  # a number, true, false or null
_BLOCK = 1 << 24
_PEEKED_RECORDS, _PEEKED_BYTES = 16, 1 << 20
_BLANKS = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
JSON_SUFFIXES: tuple[str, ...] = (".json", ".jsonl", ".ndjson")


class Records:
    """Records of one or more files by number; picklable, and cheap to hold.

    Args:
        path: a file, a folder, a glob or a range, as in :func:`find_files`.
        cache: folder for the indices; None for beside the files.

    Raises:
        ValueError: a file is not readable or no list of records, or there is not one record in all of them.
    """

    suffixes = JSON_SUFFIXES
    rules = "records 2"  # the index's name: what is counted as one

    def __init__(self, path: str, cache: Path | None = None) -> None:
        self.paths = expand(path, self.suffixes)
        self._files = OpenFiles()
        self._spans: list[NumberFile] = []  # offset and length of each record, one after the other
        for file in self.paths:
            try:
                spans = kept_numbers(file, [self.rules], cache, lambda f=file: self.index_of(f))  # type: ignore[misc]
            except OSError as error:
                raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
            self._spans.append(spans)
        self._ends = list(accumulate(len(spans) // 2 for spans in self._spans))
        if not self._ends[-1]:
            raise ValueError(f"{path}: there is not one record in it")

    def __len__(self) -> int:
        return self._ends[-1]

    def find(self, index: int) -> tuple[int, int]:
        """The number of a record's file in `paths`, and the record's within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is out of range: there are {len(self)}")
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def path(self, index: int) -> Path:
        """The file that holds a record."""
        return self.paths[self.find(index)[0]]

    def where(self, index: int) -> str:
        """A record's place, for errors: its file, and its number there, from 0."""
        file, number = self.find(index)
        return f"{self.paths[file].name}, record {number}"

    def read(self, index: int) -> Mapping[str, Any]:
        """Return a record.

        Raises:
            BadSample: bad_json, bad_record (no mapping), missing_file.
        """
        file, number = self.find(index)
        spans, where = self._spans[file], self.where(index)
        try:
            data = self._files.read(self.paths[file], spans[2 * number], spans[2 * number + 1])
        except OSError as error:
            raise BadSample("missing_file", f"{where}: {error.strerror}") from error
        return self.parse(data, file, where)

    def index_of(self, path: Path) -> np.ndarray:
        """Offset and length of each record of a file, flat."""
        with path.open("rb") as file:
            start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(start)
            blocks = iter(lambda: file.read(4096), b"")
            first = next((block.lstrip(_BLANKS)[:1] for block in blocks if block.strip(_BLANKS)), b"")
        if first == b"[":
            return _json_list(path)
        if first not in (b"{", b""):
            raise ValueError(f"{path} begins with {first!r}: it is neither a JSON list nor JSONL (unpack it first?)")
        return _lines(path, start)

    def parse(self, data: bytes, file: int, where: str) -> Mapping[str, Any]:
        """A record from its bytes; `file` is the number of its file, `where` names it in errors."""
        record = parse_json(data, where)
        if not isinstance(record, Mapping):
            raise BadSample("bad_record", f"{where}: a {type(record).__name__}, not a mapping")
        return record


def _lines(path: Path, start: int) -> np.ndarray:
    """Offset and length of the lines that are not blank, flat."""
    ends: list[np.ndarray] = []
    at = start
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            ends.append((np.frombuffer(block, np.uint8) == 10).nonzero()[0] + at + 1)
            at += len(block)
    stops = np.concatenate([*ends, np.array([at])]).astype(np.int64)
    starts = np.concatenate([np.array([start], np.int64), stops[:-1]])
    lengths = stops - starts
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if not len(starts):
        return starts
    blank = np.isin(np.memmap(path, np.uint8, "r")[starts], np.frombuffer(_BLANKS, np.uint8))  # perhaps, by its first
    keep = ~blank
    with path.open("rb") as file:
        for index in np.flatnonzero(blank & (lengths > 1)):
            file.seek(int(starts[index]))
            keep[index] = bool(file.read(int(lengths[index])).strip())
    return np.stack([starts[keep], lengths[keep]], 1).reshape(-1)


def _json_list(path: Path) -> np.ndarray:
    """Offset and length of what a JSON list holds, found without parsing it; numbers and null are bad records."""
    spans: list[tuple[int, int]] = []
    depth, start, done = 0, 0, 0  # done: where the last record ends
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for token in _TOKEN.finditer(data):
            first = data[token.start()]
            if depth == 1:
                between = _SCALAR.finditer(data, done, token.start())
                spans.extend((scalar.start(), len(scalar[0])) for scalar in between)
                start, done = token.start(), token.end()
            if first in b"[{":
                depth += 1
                done = token.end()
            elif first in b"]}":
                depth -= 1
                if depth == 1:
                    spans.append((start, token.end() - start))
                    done = token.end()
                elif depth == 0:
                    break
            elif token.end() - token.start() == 1:  # a quote without its partner
                break
            elif depth == 1:  # a text
                spans.append((start, done - start))
    if depth:
        raise ValueError(f"{path} ends within its list, after {len(spans)} records: is it cut short?")
    return np.array(spans, np.int64).reshape(-1)


def expand(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a path, of any of these endings where it is a folder.

    Raises:
        ValueError: there is none.
    """
    if not Path(path).is_dir():
        return find_files(path, suffixes[0])
    found = [file for file in find_files(path, "") if file.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{path} holds no files that end in {', '.join(suffixes)}")
    return found


def peek(path: Path) -> Iterator[Mapping[str, Any]]:
    """The first few records of a file or folder, for telling formats apart; nothing if there are none."""
    try:
        file = expand(str(path), JSON_SUFFIXES)[0]
        if file.suffix.lower() not in JSON_SUFFIXES:
            return
        with file.open("rb") as opened:
            head = opened.read(_PEEKED_BYTES).removeprefix(_BOM).lstrip(_BLANKS)
    except (OSError, ValueError):
        return
    decoder = json.JSONDecoder()
    words = head.decode("utf-8", errors="ignore")
    at = 1 if words[:1] == "[" else 0
    for _ in range(_PEEKED_RECORDS):
        while at < len(words) and words[at] in ", \t\r\n":
            at += 1
        try:
            record, at = decoder.raw_decode(words, at)
        except (ValueError, RecursionError):
            return
        if isinstance(record, Mapping):
            yield record
