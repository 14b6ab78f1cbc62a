"""Questions about films: JSON of ``video`` or ``video_id`` with ``q``/``a``, or with ``conversations``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..sample import Sample
from .dialogue import Mark, RecordConfig, RecordSource, Said, build_sample, find_marks, has_any, read_conversation
from .media import Media
from .source import BadSample, ReadOptions, Source

_QUESTION, _ANSWER = ("q", "question"), ("a", "answer")
_NUMBERS = ("fps", "frame_count")


class VideoJsonConfig(RecordConfig):
    """One film and what is said about it."""

    format: Literal["video_json"] = "video_json"

    def open(self, options: ReadOptions) -> Source:
        return VideoJsonSource(self, options)

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        named = all(has_any(record, ("video", "video_id")) for record in records)
        return named and all(has_any(record, (*_QUESTION, "conversations")) for record in records)


class VideoJsonSource(RecordSource):
    """The film stands where ``<video>`` (or ``<image>``) is, or before the first question where there is no mark.

    ``video_id`` names a file without its ending. ``fps`` and ``frame_count`` are facts about the file, which it knows
    better itself: they are checked to be numbers and kept as facts of the sample.
    """

    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        named = next((record[name] for name in ("video", "video_id") if record.get(name) not in (None, "", [])), None)
        if named is None:
            raise BadSample("bad_record", f"{where}: neither `video` nor `video_id` (there is: {', '.join(record)})")
        said = _one_mark(self._said(record, where))
        return build_sample(sample_id, said, {"video": [named]}, reader, where, **_facts(record, where))

    @staticmethod
    def _said(record: Mapping[str, Any], where: str) -> list[Said]:
        if "conversations" in record or "messages" in record:
            return read_conversation(record, where)
        texts = []
        for names, kind in ((_QUESTION, "missing_text"), (_ANSWER, "empty_answer")):
            words = next((record[name] for name in names if name in record), None)
            if not isinstance(words, str) or not words.strip():
                raise BadSample(kind, f"{where}: no text under {' or '.join(names)}")
            texts.append(words.strip())
        return [("user", find_marks(texts[0])), ("assistant", [texts[1]])]


def _one_mark(said: list[Said]) -> list[Said]:
    """One ``<image>`` or ``<video>`` per film is its place; without any it stands first."""
    marks = [piece for _, pieces in said for piece in pieces if isinstance(piece, Mark)]
    if not marks:
        first = next((index for index, (speaker, _) in enumerate(said) if speaker != "system"), 0)
        speaker, pieces = said[first]
        return [*said[:first], (speaker, [Mark("video"), *pieces]), *said[first + 1 :]]
    return [
        (speaker, [Mark("video") if isinstance(piece, Mark) else piece for piece in pieces]) for speaker, pieces in said
    ]


def _facts(record: Mapping[str, Any], where: str) -> dict[str, float]:
    facts: dict[str, float] = {}
    for name in _NUMBERS:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise BadSample("bad_record", f"{where}: {name} is {str(value)[:40]!r}, not a number of at least 0")
        facts[name] = value
    return facts
