"""LLaVA and ShareGPT4V: a JSON list or JSONL of ``image``/``images`` and ``conversations`` with ``<image>`` marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..sample import Sample
from .dialogue import RecordConfig, RecordSource, as_list, build_sample, has_any, read_conversation
from .media import Media
from .source import ReadOptions, Source


class LlavaConfig(RecordConfig):
    """Conversations about pictures; rows without a picture are text only."""

    format: Literal["llava"] = "llava"

    def open(self, options: ReadOptions) -> Source:
        return LlavaSource(self, options)

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        shown = [has_any(record, ("image", "images")) for record in records]
        return any(shown) and all("conversations" in record for record in records)


class LlavaSource(RecordSource):
    """Rows of ``image`` (a name or a list), or ``images``, and perhaps ``video``, in the order of their marks."""

    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        images = as_list(record.get("image")) or as_list(record.get("images"))
        media = {"image": images, "video": as_list(record.get("video")) or as_list(record.get("videos"))}
        return build_sample(sample_id, read_conversation(record, where), media, reader, where)
