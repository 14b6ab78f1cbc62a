"""Parquet files of captions and pictures, or of captions and the names of picture files.

- pictures within (BAGEL and many data sets of the hub): a column of bytes, or of mappings with ``bytes`` and ``path``;
- pictures beside: a column of file names, relative to the parquet file or to ``image_root``.

Scores such as COYO's ``clip_similarity_vitb32`` filter the rows before anything else is read. A table of addresses
only, as COYO and LAION publish, has to be downloaded first (img2dataset does it, and writes shards that are read as
``webdataset``).
"""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..sample import Sample
from .filters import Filter, parse_filters
from .index_files import NumberFile, kept_numbers
from .pairs import CAPTION_FIELDS, ImageTextConfig, captions_if_needed
from .paths import find_files
from .source import BadSample, ReadOptions, Source, captions_in, decode_image, image_text

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
FILE_COLUMNS = ("image_path", "file_name", "filename", "file_path", "path", "file", "image_name")
ADDRESS_COLUMNS = ("url", "URL", "image_url")
_LARGE_GROUP = 128_000_000


class ParquetConfig(ImageTextConfig):
    """Parquet files: one, a folder, a glob or a range."""

    format: Literal["parquet"] = "parquet"
    image_field: str | None = Field(None, description="column of the pictures or of their file names")
    image_root: str | None = Field(None, description="folder of the picture files; the parquet file's if absent")
    cache_bytes: int = Field(256_000_000, ge=1, description="row groups kept in memory per process, at most")

    def open(self, options: ReadOptions) -> Source:
        return ParquetSource(self, options)

    @classmethod
    def detect(cls, path: Path) -> bool:
        files = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))[:1] if path.is_dir() else []
        if not files:
            return False
        names = open_parquet(files[0]).schema_arrow.names
        has_image = any(name in names for name in (*IMAGE_COLUMNS, *FILE_COLUMNS, *ADDRESS_COLUMNS))
        return has_image and any(name in names for name in CAPTION_FIELDS)


class ParquetSource:
    """Rows of parquet files; a row is read by decoding its row group, of which the last few are kept."""

    def __init__(self, config: ParquetConfig, options: ReadOptions) -> None:
        self.name, self.config, self.options = config.label, config, options
        self._paths = find_files(config.path, ".parquet")
        self.notes: list[str] = []
        self._groups = [self._group_ends(path) for path in self._paths]
        first = open_parquet(self._paths[0]).schema_arrow
        self._image = self._column(first, config.image_field, (*IMAGE_COLUMNS, *FILE_COLUMNS), "image_field")
        self._caption: str | None = None
        if options.needs_captions or config.caption_field or any(name in first.names for name in CAPTION_FIELDS):
            self._caption = self._column(first, config.caption_field, CAPTION_FIELDS, "caption_field")
        self._kept: list[NumberFile] | None = None
        if config.filters:
            self._kept = [self._filtered(number) for number in range(len(self._paths))]
        sizes = list(map(len, self._kept)) if self._kept else [ends[-1] for ends in self._groups]
        self._ends = list(accumulate(sizes))
        if not self._ends[-1]:
            rows = sum(ends[-1] for ends in self._groups)
            reason = f"none of {rows} rows passes the filters" if rows else "the files hold no rows"
            raise ValueError(f"source {self.name!r} ({config.path}): {reason}")
        columns = [self._image] if self._caption is None else [self._image, self._caption]
        self._cache = GroupCache(columns, config.cache_bytes)

    def _group_ends(self, path: Path) -> list[int]:
        metadata = open_parquet(path).metadata
        ends, largest = [0], 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            ends.append(ends[-1] + group.num_rows)
            largest = max(largest, group.total_byte_size)
        if largest > _LARGE_GROUP:
            note = (
                f"{path} has row groups of {largest / 1e6:.0f} MB, each decoded for one random row: rewrite it with "
                "row groups of some tens of rows"
            )
            self.notes.append(note)
            logger.warning(note)
        return ends

    def _column(self, schema: Any, given: str | None, usual: tuple[str, ...], option: str) -> str:
        names = schema.names
        if given is not None:
            if not _has_column(schema, given):
                raise ValueError(f"source {self.name!r}: no column {given!r}; there are {_described(schema)}")
            return given
        found = next((name for name in usual if name in names), None)
        if found is not None:
            return found
        if option == "image_field" and any(name in names for name in ADDRESS_COLUMNS):
            raise ValueError(
                f"source {self.name!r} holds addresses of pictures and no pictures: download them first, for example "
                "with img2dataset, and read its output"
            )
        raise ValueError(f"source {self.name!r}: name its column as {option}; there are {', '.join(names)}")

    def _filtered(self, number: int) -> NumberFile:
        path = self._paths[number]
        rules = ["parquet", *self.config.filters]
        return kept_numbers(path, rules, self.options.cache, lambda: self._pass(path))

    def _pass(self, path: Path) -> np.ndarray:
        filters = parse_filters(self.config.filters)
        file, kept = open_parquet(path), []
        for rule in filters:
            if not _has_column(file.schema_arrow, rule.field):
                names = _described(file.schema_arrow)
                raise ValueError(f"source {self.name!r}: filter on {rule.field!r}, but {path.name} has {names}")
        for batch in file.iter_batches(columns=sorted({rule.field for rule in filters})):
            marks = np.ones(len(batch), dtype=bool)
            for rule in filters:
                marks &= _passing(rule, _column_of(batch, rule.field))
            kept.append(marks)
        return np.flatnonzero(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return self._paths

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[int, int]:
        """Number of the file and of the row within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: {self.name} has {len(self)}")
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        return number, self._kept[number][within] if self._kept else within

    def shard(self, index: int) -> str:
        return self._paths[self._find(index)[0]].name

    def read(self, index: int) -> Sample:
        number, row = self._find(index)
        path, ends = self._paths[number], self._groups[number]
        group = bisect_right(ends, row) - 1
        where = f"{path.name} row {row}"
        try:
            columns = self._cache.get(path, group)
        except (OSError, ValueError) as error:
            raise BadSample("bad_record", f"{where}: its row group cannot be read ({error})") from error
        picture, *caption = (column[row - ends[group]].as_py() for column in columns)
        captions = captions_if_needed(
            self.options, lambda: captions_in(_unpacked(*caption or [None]), f"{where}: {self._caption}")
        )
        source = self._picture(picture, path, where)
        pixels = decode_image(source, f"{where}: {self._image}", self.options, self.config.min_side)
        return image_text(f"{self.name}/{path.stem}/{row}", pixels, captions)

    def _picture(self, value: Any, path: Path, where: str) -> bytes | str:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BadSample("missing_file", f"{where}: no picture in {self._image}")
        return value if "://" in value else os.path.join(self.config.image_root or path.parent, value)


class GroupCache:
    """The columns of the row groups read last, up to a number of bytes; empty after pickling."""

    def __init__(self, columns: list[str], limit: int) -> None:
        self.columns, self.limit = columns, limit
        self._groups: OrderedDict[tuple[Path, int], list[Any]] = OrderedDict()
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._owner = os.getpid()
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self.columns, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, path: Path, group: int) -> list[Any]:
        """Return the columns of a row group, in the order of ``columns``; ``ValueError`` where one is not there."""
        if self._owner != os.getpid():  # forked: open files of one's own
            self._files, self._owner = OrderedDict(), os.getpid()
        key = (path, group)
        if key not in self._groups:
            file = self._files.pop(path, None) or open_parquet(path)
            self._files[path] = file
            if len(self._files) > 8:
                self._files.popitem(last=False)
            table = file.read_row_group(group, columns=self.columns, use_threads=False)
            self._groups[key] = [_column_of(table, name) for name in self.columns]
            self._bytes += sum(column.nbytes for column in self._groups[key])
            while self._bytes > self.limit and len(self._groups) > 1:
                _, old = self._groups.popitem(last=False)
                self._bytes -= sum(column.nbytes for column in old)
        self._groups.move_to_end(key)
        return self._groups[key]


def open_parquet(path: Path) -> Any:
    """Open a parquet file; ``ValueError`` where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _has_column(schema: Any, name: str) -> bool:
    """Whether a column of this name is there; dots go into columns of mappings."""
    import pyarrow

    if name in schema.names:
        return True
    first, *parts = name.split(".")
    kind = schema.field(first).type if parts and first in schema.names else None
    for part in parts:
        if kind is None or not pyarrow.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return kind is not None


def _column_of(table: Any, name: str) -> Any:
    """A column of a table or batch, as `_has_column` finds it; a field of no mapping is null."""
    import pyarrow.compute

    if not _has_column(table.schema, name):
        raise ValueError(f"no column {name!r}; there are {_described(table.schema)}")
    if name in table.schema.names:
        return table.column(name)
    first, *parts = name.split(".")
    return pyarrow.compute.struct_field(table.column(first), parts)


def _described(schema: Any) -> str:
    import pyarrow

    return ", ".join(
        f"{field.name} ({', '.join(part.name for part in field.type)})"
        if pyarrow.types.is_struct(field.type)
        else field.name
        for field in schema
    )


def _passing(rule: Filter, column: Any) -> np.ndarray:
    if isinstance(rule.value, str):
        return np.fromiter((rule.passes(value) for value in column.to_pylist()), dtype=bool, count=len(column))
    try:
        values = column.cast("float64").to_numpy(zero_copy_only=False)
    except (ValueError, NotImplementedError):  # a column of text, mixed kinds or mappings
        return np.fromiter((rule.passes(value) for value in column.to_pylist()), dtype=bool, count=len(column))
    compared = {
        ">=": np.greater_equal,
        "<=": np.less_equal,
        "==": np.equal,
        "!=": np.not_equal,
        ">": np.greater,
        "<": np.less,
    }[rule.sign](values, rule.value)
    return compared & ~np.isnan(values)


def _unpacked(value: Any) -> Any:
    """A caption column may hold JSON: a mapping of kinds to captions, or a list of them."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            unpacked = json.loads(value)
        except (ValueError, RecursionError):
            return value  # a caption that begins with a bracket
        return unpacked if isinstance(unpacked, dict | list) else value
    return value
