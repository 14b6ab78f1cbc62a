"""Image-text shards in webdataset's layout: ``KEY.jpg`` (jpeg, png, webp) with ``KEY.txt`` or ``KEY.json``.

What img2dataset writes (with ``output_format=webdataset``) is this format; COYO and the like come in it once they are
downloaded.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..sample import Sample
from .filters import parse_filters, passes_all
from .index_files import NumberFile, kept_numbers
from .pairs import IMAGE_ENDINGS, ImageTextConfig, captions_if_needed, captions_of
from .paths import find_files
from .source import (
    BadSample,
    OpenFiles,
    ReadOptions,
    Source,
    decode_image,
    decode_text,
    image_text,
    parse_json,
)
from .tar_index import TarIndex, TarSample

logger = logging.getLogger(__name__)


class WebdatasetConfig(ImageTextConfig):
    """Tar shards: a folder, a glob, or a range as in ``data/{00000..00041}.tar``."""

    format: Literal["webdataset"] = "webdataset"
    image_endings: list[str] = Field(default_factory=lambda: list(IMAGE_ENDINGS), min_length=1)

    def open(self, options: ReadOptions) -> Source:
        return WebdatasetSource(self, options)

    @classmethod
    def detect(cls, path: Path) -> bool:
        shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))[:1] if path.is_dir() else []
        if not shards:
            return False
        index = TarIndex(shards[0])
        endings = set(index.sample(0).members) if len(index) else set()
        return bool(endings & set(IMAGE_ENDINGS)) and bool(endings & {"txt", "json"})


class WebdatasetSource:
    """Samples of tar shards, each reached through the shard's index."""

    def __init__(self, config: WebdatasetConfig, options: ReadOptions) -> None:
        self.name, self.config, self.options = config.label, config, options
        files = OpenFiles()
        self._shards = [TarIndex(path, options.cache, files) for path in find_files(config.path, ".tar")]
        self.faults = [f"{shard.path} {shard.note}" for shard in self._shards if shard.note]
        self._kept: list[NumberFile] | None = None
        if config.filters:
            self._kept = [self._filtered(shard) for shard in self._shards]
        sizes = [len(part) for part in self._kept or self._shards]
        self._ends = list(accumulate(sizes))
        if not self._ends[-1]:
            found = sum(map(len, self._shards))
            reason = f"none of {found} samples passes the filters" if found else "the shards hold no samples"
            raise ValueError(f"source {self.name!r} ({config.path}): {reason}")

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return [shard.path for shard in self._shards]

    def __len__(self) -> int:
        return self._ends[-1]

    def _filtered(self, shard: TarIndex) -> NumberFile:
        rules = ["webdataset", *self.config.filters]
        return kept_numbers(shard.path, rules, self.options.cache, lambda: self._pass(shard))

    def _pass(self, shard: TarIndex) -> list[int]:
        logger.info("%s: filtering %s", self.name, shard.path.name)
        filters, kept = parse_filters(self.config.filters), []
        for number in range(len(shard)):
            sample = shard.sample(number)
            try:
                record = parse_json(shard.read(sample, "json"), sample.key)
            except BadSample:
                record = None  # without readable scores nothing passes
            if isinstance(record, dict) and passes_all(filters, record):
                kept.append(number)
        return kept

    def _find(self, index: int) -> tuple[TarIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: {self.name} has {len(self)}")
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        return self._shards[number], self._kept[number][within] if self._kept else within

    def shard(self, index: int) -> str:
        return self._find(index)[0].path.name

    def read(self, index: int) -> Sample:
        shard, number = self._find(index)
        sample = shard.sample(number)
        where = f"{shard.path.name}:{sample.key}"
        ending = next((name for name in self.config.image_endings if name in sample.members), None)
        if ending is None:
            wanted = "/".join(self.config.image_endings)
            raise BadSample("missing_file", f"{where}: no {wanted} (it has {', '.join(sample.members)})")
        captions = captions_if_needed(self.options, lambda: self._captions(shard, sample, where))
        pixels = decode_image(shard.read(sample, ending), f"{where}.{ending}", self.options, self.config.min_side)
        return image_text(f"{self.name}/{shard.path.stem}/{sample.key}", pixels, captions)

    def _captions(self, shard: TarIndex, sample: TarSample, where: str) -> list[str]:
        field = self.config.caption_field
        if field is None and "txt" in sample.members:
            return [decode_text(shard.read(sample, "txt"), f"{where}.txt")]
        if "json" not in sample.members:
            raise BadSample("missing_text", f"{where}: neither .txt nor .json (it has {', '.join(sample.members)})")
        return captions_of(parse_json(shard.read(sample, "json"), f"{where}.json"), field, f"{where}.json")
