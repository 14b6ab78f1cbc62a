"""What the formats of pictures with captions share: their settings, and how a caption is found in a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from .filters import parse_filters
from .source import BadSample, ReadOptions, SourceConfig, captions_in, require

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "captions", "text", "TEXT", "prompt")


class ImageTextConfig(SourceConfig):
    """What the formats of pictures with captions share. Language stages read half of the pairs each way round."""

    forms: dict[str, float] | None = Field(default_factory=lambda: {"image_text": 1.0, "text_image": 1.0})
    caption_field: str | None = Field(None, description="field of the caption; dots go into mappings")
    filters: list[str] = Field(default_factory=list, description="conditions on fields: clip_similarity_vitb32 >= 0.3")
    min_side: int = Field(1, ge=1, description="smaller pictures are bad samples of kind too_small")

    @field_validator("filters")
    @classmethod
    def _are_rules(cls, rules: list[str]) -> list[str]:
        parse_filters(rules)
        return rules


def captions_of(record: Any, field: str | None, where: str) -> list[str]:
    """Return the captions of a metadata record: of the named field, or of the first usual one that is there.

    Raises:
        BadSample: bad_record, missing_text.
    """
    if field is not None:
        return captions_in(require(record, field, where), f"{where}: {field}")
    for name in CAPTION_FIELDS:
        if isinstance(record, dict) and name in record:
            return captions_in(record[name], f"{where}: {name}")
    raise BadSample(
        "missing_text", f"{where}: none of the fields {', '.join(CAPTION_FIELDS)}; name it as caption_field"
    )


def captions_if_needed(options: ReadOptions, find: Callable[[], list[str]]) -> list[str]:
    """Return the captions that are found, or an empty one where there is none and nobody needs it.

    Raises:
        BadSample: what finding raises.
    """
    try:
        return find()
    except BadSample as bad:
        if options.needs_captions or bad.kind != "missing_text":
            raise
        return [""]
