"""OpenVid: a CSV of file names and captions beside a folder of films, for drawing films from text."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..sample import Sample, Turn, text
from .dialogue import RecordConfig, media_folder
from .files import find_files
from .lines import Table
from .media import Media
from .source import ReadOptions, Source, require_text


class OpenVidConfig(RecordConfig):
    """One film and its caption per row."""

    format: Literal["openvid"] = "openvid"
    video_column: str = Field("video", description="column of the file name")
    caption_column: str = Field("caption", description="column of the caption")

    def open(self, options: ReadOptions) -> Source:
        return OpenVidSource(self, options)

    @classmethod
    def detect(cls, path: Path) -> bool:
        if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.readline(4096).decode("utf-8-sig", errors="replace").lower()
        names = [name.strip().strip('"') for name in head.replace("\t", ",").split(",")]
        return "video" in names and "caption" in names


class OpenVidSource:
    """Rows of films; a film's frames are spread over the whole of it."""

    def __init__(self, config: OpenVidConfig, options: ReadOptions) -> None:
        self.name, self.config, self.options = config.label, config, options
        self._tables = [Table(path) for path in find_files(config.path, ".csv")]
        for table in self._tables:
            for option in ("video_column", "caption_column"):
                if getattr(config, option) not in table.columns:
                    raise ValueError(
                        f"source {self.name!r}: {table.path} has no column {getattr(config, option)!r}: name it as "
                        f"{option} (there are: {', '.join(table.columns)})"
                    )
        self._folder = media_folder(config)
        self._ends = list(accumulate(map(len, self._tables)))
        if not self._ends[-1]:
            raise ValueError(f"source {self.name!r} ({config.path}): there are no rows")

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: {self.name} has {len(self)}")
        number = bisect_right(self._ends, index)
        return self._tables[number], index - (self._ends[number - 1] if number else 0)

    def shard(self, index: int) -> str:
        return self._find(index)[0].path.name

    def read(self, index: int) -> Sample:
        table, number = self._find(index)
        row = table.row(number)
        where = f"{table.path.name} row {number + 1}"
        named = require_text(row[self.config.video_column], f"{where}: {self.config.video_column}")
        caption = require_text(row[self.config.caption_column], f"{where}: {self.config.caption_column}")
        film = Media(self._folder or table.path.parent, self.options).video(named, f"{where}, {named[-80:]}")
        turns = (Turn("user", (text(caption),)), Turn("assistant", (film,)))
        return Sample(f"{self.name}/{table.path.stem}/{number}", "text_video", turns)
