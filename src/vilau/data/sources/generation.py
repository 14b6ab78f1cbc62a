"""Shards for drawing pictures from text: a tar of pictures, each with a prompt in its .json or .txt.

The prompt is the field ``sharegpt4v``, else ``prompt``, or the one named as ``caption_field``; without such a field, or
without a .json, the .txt. The same shards read as ``webdataset`` can serve both ways; this format is always [text,
image].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..sample import Sample, Turn
from .pairs import IMAGE_ENDINGS, ImageTextConfig, captions_of
from .source import BadSample, ReadOptions, Source, captions_in, decode_text, parse_json
from .tar_index import TarIndex, TarSample
from .webdataset import WebdatasetSource

PROMPT_FIELDS = ("sharegpt4v", "prompt")


class GenerationConfig(ImageTextConfig):
    """Tar shards: a folder, a glob, or a range as in ``data/{00000..00041}.tar``."""

    format: Literal["generation"] = "generation"
    image_endings: list[str] = Field(default_factory=lambda: list(IMAGE_ENDINGS), min_length=1)

    def open(self, options: ReadOptions) -> Source:
        return GenerationSource(self, options)

    @classmethod
    def detect(cls, path: Path) -> bool:
        shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))[:1] if path.is_dir() else []
        index = TarIndex(shards[0]) if shards else None
        if index is None or not len(index) or "json" not in index.sample(0).members:
            return False
        try:
            record = parse_json(index.read(index.sample(0), "json"), str(path))
        except BadSample:
            return False
        return isinstance(record, dict) and "sharegpt4v" in record


class GenerationSource(WebdatasetSource):
    """Samples ``text_image`` of tar shards."""

    config: GenerationConfig  # type: ignore[assignment]

    def __init__(self, config: GenerationConfig, options: ReadOptions) -> None:
        super().__init__(config, options)  # type: ignore[arg-type]

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        shown, said = sample.turns
        return replace(sample, form="text_image", turns=(Turn("user", said.parts), Turn("assistant", shown.parts)))

    def _captions(self, shard: TarIndex, sample: TarSample, where: str) -> list[str]:
        field, record = self.config.caption_field, None
        if "json" in sample.members:
            record = parse_json(shard.read(sample, "json"), f"{where}.json")
            if field is not None:
                return captions_of(record, field, f"{where}.json")
            found = _prompt(record, f"{where}.json")
            if found:
                return found
        if field is None and "txt" in sample.members:
            return [decode_text(shard.read(sample, "txt"), f"{where}.txt")]
        wanted = f"no field {field!r}" if field else f"none of the fields {', '.join(PROMPT_FIELDS)}, and no .txt"
        raise BadSample("missing_text", f"{where}: {wanted}; name the prompt's field as caption_field")


def _prompt(record: Any, where: str) -> list[str]:
    name = next((name for name in PROMPT_FIELDS if isinstance(record, dict) and record.get(name)), None)
    return captions_in(record[name], f"{where}: {name}") if name else []
