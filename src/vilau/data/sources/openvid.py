"""OpenVid: a CSV of file names and captions beside a folder of films, for drawing films from text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ..sample import Sample, Turn, text
from .dialogue import RecordConfig, media_folder
from .media import Media
from .source import ReadOptions, Source, require_text
from .tables import Rows


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
        self._rows = Rows(config.path, options.cache)
        for number, path in enumerate(self._rows.paths):
            columns = self._rows.columns(number)
            for option in ("video_column", "caption_column"):
                if getattr(config, option) not in columns:
                    raise ValueError(
                        f"source {self.name!r}: {path} has no column {getattr(config, option)!r}: name it as "
                        f"{option} (there are: {', '.join(columns)})"
                    )
        self._folder = media_folder(config)

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return self._rows.paths

    def __len__(self) -> int:
        return len(self._rows)

    def shard(self, index: int) -> str:
        return self._rows.path(index).name

    def read(self, index: int) -> Sample:
        row, where = self._rows.read(index), self._rows.where(index)
        path, number = self._rows.path(index), self._rows.find(index)[1]
        named = require_text(row[self.config.video_column], f"{where}: {self.config.video_column}")
        caption = require_text(row[self.config.caption_column], f"{where}: {self.config.caption_column}")
        film = Media(self._folder or path.parent, self.options).video(named, f"{where}, {named[-80:]}")
        turns = (Turn("user", (text(caption),)), Turn("assistant", (film,)))
        return Sample(f"{self.name}/{path.stem}/{number}", "text_video", turns)
