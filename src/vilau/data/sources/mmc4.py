"""MMC4: JSONL documents of sentences (``text_list``) and pictures matched to them (``image_info``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ..sample import Part, Sample, Turn, text
from .dialogue import RecordConfig, RecordSource
from .media import Media
from .source import BadSample, ReadOptions, Source


class Mmc4Config(RecordConfig):
    """Interleaved documents; pictures as files (``image_name``) or within the record (``image_base64``)."""

    format: Literal["mmc4"] = "mmc4"
    max_images: int = Field(6, ge=0, description="the first so many pictures of a document, as VILA takes them")
    min_similarity: float = Field(0.0, description="pictures whose matched_sim is lower are left out")
    drop_missing: bool = Field(
        False, description="leave pictures out whose files are not there, instead of the whole document"
    )

    def open(self, options: ReadOptions) -> Source:
        return Mmc4Source(self, options)

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        return all("text_list" in record and "image_info" in record for record in records)


class Mmc4Source(RecordSource):
    """A picture stands before the sentence it is matched to; sentences without one between are joined by blanks."""

    def __init__(self, config: Mmc4Config, options: ReadOptions) -> None:
        super().__init__(config, options)
        self.config = config

    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        sentences, infos = record.get("text_list"), record.get("image_info")
        if not isinstance(sentences, list) or not isinstance(infos, list):
            raise BadSample("bad_record", f"{where}: text_list and image_info must be lists")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise BadSample("bad_record", f"{where}: a sentence of text_list is not text")
        if not any(sentence.strip() for sentence in sentences):
            raise BadSample("missing_text", f"{where}: text_list has no words")
        shown = self._pictures(infos, len(sentences), reader, where)
        parts: list[Part] = []
        words: list[str] = []
        for number, sentence in enumerate(sentences):
            here = shown.get(number, [])
            if here and words:
                parts.append(text(" ".join(words)))
                words = []
            parts.extend(here)
            if sentence.strip():
                words.append(sentence.strip())
        if words:
            parts.append(text(" ".join(words)))
        return Sample(sample_id, "interleaved", (Turn("document", tuple(parts)),))

    def _pictures(self, infos: Sequence[Any], sentences: int, reader: Media, where: str) -> dict[int, list[Part]]:
        """Pictures by the sentence they stand before, in their order."""
        places: list[tuple[int, Mapping[str, Any], str]] = []
        for number, info in enumerate(infos):
            place = info.get("matched_text_index") if isinstance(info, Mapping) else None
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < sentences:
                raise BadSample(
                    "bad_record", f"{where}: picture {number} is matched to {place!r} of {sentences} sentences"
                )
            similarity = info.get("matched_sim")
            if isinstance(similarity, int | float) and similarity < self.config.min_similarity:
                continue
            places.append((place, info, f"{where}, picture {number}"))
        shown: dict[int, list[Part]] = {}
        for place, info, name in places[: self.config.max_images]:
            try:
                part = self._picture(info, reader, name)
            except BadSample as bad:
                if self.config.drop_missing and bad.kind == "missing_file":
                    continue
                raise
            shown.setdefault(place, []).append(part)
        return shown

    @staticmethod
    def _picture(info: Mapping[str, Any], reader: Media, where: str) -> Part:
        if info.get("image_base64"):
            return reader.base64_image(info["image_base64"], where)
        if info.get("image_name"):
            return reader.image(info["image_name"], where)
        raise BadSample("missing_file", f"{where}: neither image_base64 nor image_name")
