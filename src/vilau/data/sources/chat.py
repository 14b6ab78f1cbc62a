"""Text-only chats: `conversations` (`from`, `value`) of ShareGPT or `messages` (`role`, `content`) of OpenAI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..sample import Sample
from .dialogue import RecordConfig, RecordSource, build_sample, has_any, read_conversation
from .media import Media
from .source import ReadOptions, Source


class ChatConfig(RecordConfig):
    """Conversations without pictures, as JSON or JSONL."""

    format: Literal["chat"] = "chat"

    def open(self, options: ReadOptions) -> Source:
        return ChatSource(self, options)

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        shown = ("image", "images", "video", "videos", "video_id")
        return all(has_any(r, ("conversations", "messages")) and not has_any(r, shown) for r in records)


class ChatSource(RecordSource):
    """What is said is text throughout: ``<image>`` in a chat about HTML is no mark of a picture."""

    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        return build_sample(sample_id, read_conversation(record, where, marks=False), {}, reader, where)
