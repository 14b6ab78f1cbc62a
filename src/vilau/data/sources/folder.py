"""Plain folders of pictures: captions in files of the same name, in a table, or made from the names of subfolders.

- ``0001.jpg`` beside ``0001.txt`` or ``0001.json`` (what img2dataset writes with ``output_format=files``);
- ``captions.csv``, ``captions.jsonl``, ``metadata.csv`` or ``metadata.jsonl`` with a file name and a caption per row;
- ``cat/01.png``, ``dog/07.png``: the caption is made from the subfolder's name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..permutation import hash64
from ..sample import Sample
from .filters import parse_filters, passes_all
from .pairs import ImageTextConfig, captions_if_needed, captions_of
from .source import BadSample, ReadOptions, Source, decode_image, decode_text, image_text, parse_json, read_file
from .strings import Strings
from .tables import open_table

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
TABLES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
FILE_FIELDS = ("file_name", "filename", "image", "image_path", "file", "path")

Captions = Literal["auto", "files", "table", "classes"]


class FolderConfig(ImageTextConfig):
    """A folder of picture files, read with its subfolders."""

    format: Literal["folder"] = "folder"
    captions: Captions = Field("auto", description="files: same-name .txt/.json; table: one file; classes: subfolders")
    table: str | None = Field(None, description="the table's file in the folder, if it has another name")
    file_field: str | None = Field(None, description="column of the table that names the picture")
    templates: list[str] = Field(
        default_factory=lambda: ["a photo of a {}"], min_length=1, description="captions of classes; {} is the name"
    )

    @model_validator(mode="after")
    def _check(self) -> FolderConfig:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} must hold {{}} for the class's name")
        if self.filters and self.captions == "classes":
            raise ValueError("filters need metadata, and the names of subfolders are none: leave them out")
        return self

    def open(self, options: ReadOptions) -> Source:
        root = Path(self.path)
        if not root.is_dir():
            raise ValueError(f"source {self.label!r}: {self.path} is not a folder")
        table = self._find_table(root)
        kind = "table" if self.captions == "auto" and table is not None else self.captions
        if kind == "table":
            if table is None:
                raise ValueError(f"source {self.label!r}: {root} has none of {', '.join(TABLES)}; name it as `table`")
            return TableSource(self, root, table, options)
        return FilesSource(self, root, options)

    def _find_table(self, root: Path) -> Path | None:
        names = TABLES if self.table is None else (self.table,)
        found = next((root / name for name in names if (root / name).is_file()), None)
        if self.table is not None and found is None:
            raise ValueError(f"source {self.label!r}: there is no table {root / self.table}")
        return found

    @classmethod
    def detect(cls, path: Path) -> bool:
        if not path.is_dir():
            return False
        names = (name for _, _, files in os.walk(path) for name in files)
        return any(os.path.splitext(name)[1].lower() in PICTURES for name in names)


class FilesSource:
    """Pictures found by walking a folder; a caption per picture from the file beside it, or from its subfolder."""

    def __init__(self, config: FolderConfig, root: Path, options: ReadOptions) -> None:
        self.name, self.config, self.root, self.options = config.label, config, root, options
        found = _walk(root)
        if not found:
            raise ValueError(f"source {self.name!r}: {root} holds no pictures ({', '.join(sorted(PICTURES))})")
        self.classes = config.captions == "classes" or (config.captions == "auto" and _are_classes(root, found))
        if config.filters:
            filters = parse_filters(config.filters)
            kept = [name for name in found if passes_all(filters, _record_beside(root / name))]
            if not kept:
                raise ValueError(f"source {self.name!r} ({root}): none of {len(found)} pictures passes the filters")
            found = kept
        self._names = Strings(found)

    @property
    def files(self) -> list[str]:
        """The pictures, and where captions beside them may lie."""
        names = [os.path.join(self.root, self._names[index]) for index in range(len(self))]
        endings = () if self.classes else (".txt", ".json")
        return [file for name in names for file in (name, *(os.path.splitext(name)[0] + end for end in endings))]

    def __len__(self) -> int:
        return len(self._names)

    def shard(self, index: int) -> str:
        return os.path.dirname(self._names[index]) or "."

    def read(self, index: int) -> Sample:
        name = self._names[index]
        captions = captions_if_needed(self.options, lambda: self._captions(name))
        pixels = decode_image(str(self.root / name), name, self.options, self.config.min_side)
        return image_text(f"{self.name}/{name}", pixels, captions)

    def _captions(self, name: str) -> list[str]:
        if self.classes:
            parent = os.path.basename(os.path.dirname(name)).replace("_", " ").strip()
            if not parent:
                raise BadSample("missing_text", f"{name}: not in a subfolder, whose name would be its caption")
            templates = self.config.templates
            first = hash64(name) % len(templates)  # the others follow in later epochs
            return [template.replace("{}", parent) for template in templates[first:] + templates[:first]]
        beside = (self.root / name).with_suffix("")
        texts, records = (Path(f"{beside}{ending}") for ending in (".txt", ".json"))
        if texts.is_file() and self.config.caption_field is None:
            return [decode_text(_bytes_of(texts), f"{name}: {texts.name}")]
        if records.is_file():
            record = parse_json(read_file(records, records.name), records.name)
            return captions_of(record, self.config.caption_field, records.name)
        raise BadSample("missing_text", f"{name}: neither {texts.name} nor {records.name} is beside it")


class TableSource:
    """Pictures named by the rows of a table; the rows are reached by seeking."""

    def __init__(self, config: FolderConfig, root: Path, table: Path, options: ReadOptions) -> None:
        self.name, self.config, self.root, self.options = config.label, config, root, options
        self._table = open_table(str(table), options.cache)
        self._kept: list[int] | None = None
        if config.filters:
            filters = parse_filters(config.filters)
            self._kept = [number for number in range(len(self._table)) if self._passes(number, filters)]
        if not len(self):
            raise ValueError(f"source {self.name!r} ({table}): no row passes the filters")

    def _passes(self, number: int, filters: Any) -> bool:
        try:
            return passes_all(filters, self._table.read(number))
        except BadSample:
            return False

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return self._table.paths

    def __len__(self) -> int:
        return len(self._table if self._kept is None else self._kept)

    def shard(self, index: int) -> str:
        return self._table.path(index).name

    def read(self, index: int) -> Sample:
        number = index if self._kept is None else self._kept[index]
        row, where = self._table.read(number), self._table.where(number)
        name = _file_of(row, self.config.file_field, where)
        captions = captions_if_needed(self.options, lambda: captions_of(row, self.config.caption_field, where))
        pixels = decode_image(_below(self.root, name), f"{where}: {name}", self.options, self.config.min_side)
        return image_text(f"{self.name}/{number}/{name}", pixels, captions)


def _file_of(row: Any, field: str | None, where: str) -> str:
    for name in FILE_FIELDS if field is None else (field,):
        if isinstance(row, dict) and row.get(name):
            if not isinstance(row[name], str):
                raise BadSample("bad_record", f"{where}: {name} is {type(row[name]).__name__}, not a file name")
            return str(row[name])
    wanted = field or ", ".join(FILE_FIELDS)
    raise BadSample("bad_record", f"{where}: no file name in {wanted}; name its column as file_field")


def _below(root: Path, name: str) -> str:
    """The path of a file of the data set; an address stays one, so that decoding says what it is."""
    return name if "://" in name else str(root / name)


def _bytes_of(path: Path) -> bytes:
    """A small file's bytes, none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _walk(root: Path) -> list[str]:
    """Relative names of all pictures below a folder, sorted, hidden ones left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in files:
            if os.path.splitext(name)[1].lower() in PICTURES and not name.startswith("."):
                found.append(name if inside == "." else os.path.join(inside, name))
    return sorted(found)


def _are_classes(root: Path, found: list[str]) -> bool:
    """Whether all pictures are in subfolders and none of the first ones has a caption beside it."""
    if any(os.sep not in name for name in found):
        return False
    some = found[:: max(1, len(found) // 50)]
    return not any((root / name).with_suffix(ending).is_file() for name in some for ending in (".txt", ".json"))


def _record_beside(picture: Path) -> dict[str, Any]:
    path = picture.with_suffix(".json")
    try:
        record = parse_json(read_file(path, path.name), path.name)
    except BadSample:
        return {}
    return record if isinstance(record, dict) else {}
