"""What every data source is: samples by number, decoded when read, and a named reason for each that cannot be.

A source opens no media file before ``read``: it knows how many samples there are and where each one lies. ``read``
decodes pictures and films at their own size; bringing them to the model's square is ``processing``'s business. Sources
are pickled into loader processes, so whatever they hold open is opened again there (:class:`OpenFiles`).
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...processing.images import MAX_PIXELS, MediaError, load_image
from ...processing.videos import VideoLimits, load_video
from ..sample import Sample, Turn, image, text
from ..variation import PAIR_FORMS

KINDS: dict[str, str] = {
    "missing_file": "a file that is not there",
    "empty_file": "a file of no bytes",
    "wrong_type": "not a picture or film of a known format",
    "broken_image": "a picture that is cut short or damaged",
    "too_large": "more pixels, seconds or bytes than the limit",
    "too_small": "a picture below the smallest side",
    "broken_video": "a film that is cut short or damaged",
    "missing_text": "no text where there must be some",
    "bad_json": "not valid JSON",
    "bad_record": "a field that is missing or of the wrong kind",
    "image_count": "marks of pictures and pictures do not match",
    "unknown_role": "a speaker that is neither user nor assistant",
    "turn_order": "speakers that do not take turns",
    "empty_answer": "an answer without words or pictures",
    "remote_file": "an address instead of a file: nothing is fetched",
    "too_long": "more positions than a row holds",
}
_PLACES, _FOLDERS = ("path", "cache_bytes"), ("media", "image_root")
MAX_JSON_BYTES = 16_000_000


class BadSample(ValueError):
    """One sample cannot be used; ``kind`` is a key of ``KINDS``. Mixtures skip and count it.

    The message is one line for people; it may name a file.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        assert kind in KINDS, f"unknown kind of bad sample {kind!r}: add it to KINDS"
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSample, (self.kind, str(self))


@dataclass(frozen=True)
class ReadOptions:
    """What reading needs to know from outside a source.

    num_frames: frames of a film.
    max_pixels: of one picture; a larger one is a bad sample of kind ``too_large``.
    cache: folder for indices; beside the data if absent, in the user's cache where that cannot be written.
    needs_captions: whether a picture without a caption is a bad sample; otherwise its caption is empty.
    image_size: side of the model's square, for sources that draw their pictures.
    held_out: for validation: sources that draw their pictures show what they never show in training.
    """

    num_frames: int = 8
    max_pixels: int = MAX_PIXELS
    video_limits: VideoLimits = field(default_factory=VideoLimits)
    cache: Path | None = None
    needs_captions: bool = True
    image_size: int = 256
    held_out: bool = False


class Source(Protocol):
    """Samples of one place and format, reachable by number.

    ``name`` is unique within a mixture. A source is picklable and may be read by several processes at once. Opening one
    with no samples at all is a ``ValueError``. One that has ``files``, a list of paths, lets stored codes notice that
    these changed.
    """

    @property
    def name(self) -> str:
        """Short name for counts and sample ids."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Return a sample with frames ``(H, W, 3)`` uint8 RGB of their own size, decoded here.

        The same index gives the same sample always. Raises ``BadSample`` for whatever is wrong with this one sample.
        """

    def shard(self, index: int) -> str:
        """Return the name of the file that holds a sample, for counts; never fails."""


class SourceConfig(BaseModel, ABC):
    """Where a source lies and how it is read: the part of an entry of ``data.sources`` that all formats share.

    A subclass sets ``format: Literal["name"] = "name"``, adds its fields, and is listed in ``sources/registry.py``.
    """

    model_config = ConfigDict(extra="forbid")

    format: str
    path: str = Field(..., description="file or folder; globs and braces where the format has several files")
    name: str | None = Field(None, description="for counts and sample ids; made from the path if absent")
    weight: float | Literal["size"] = Field(1.0, description="share in the mixture, above 0; size: its samples' number")
    epochs: float | None = Field(None, gt=0, description="read at most so often; endlessly if absent")
    forms: dict[str, float] | None = Field(
        None, description="for pairs of picture and text: image_text, text_image -> share; as read if absent"
    )

    @field_validator("forms")
    @classmethod
    def _are_ways_round(cls, forms: dict[str, float] | None) -> dict[str, float] | None:
        if forms is None or (forms and set(forms) <= set(PAIR_FORMS) and min(forms.values()) > 0):
            return forms
        raise ValueError(f"needs one or both of {' and '.join(PAIR_FORMS)}, each with a share above 0")

    @abstractmethod
    def open(self, options: ReadOptions) -> Source:
        """Return the source, its samples counted and none of them decoded.

        Raises:
            ValueError: nothing is there, or the whole source is not what its format says; the remedy is named.
        """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Return whether the content of an existing file or folder looks like this format; reads little."""
        return False

    @property
    def label(self) -> str:
        """The source's name: ``name``, or the last part of the path."""
        return self.name or Path(self.path).name or self.path

    @property
    def ways_round(self) -> Mapping[str, float] | None:
        """How a mixture turns this source's pairs round: image_text, text_image -> share; as read if None."""
        return self.forms

    def content(self) -> dict[str, Any]:
        """Return the fields that decide what a sample is, and not how often or in which order it is read."""
        return self.model_dump(mode="json", exclude={"weight", "epochs", "forms", "name"})

    def facts(self) -> dict[str, Any]:
        """Return what `content` does, the same wherever the data lies and whatever fields later versions add.

        The files of `path` are told apart by what is in them; of other folders, the last two names are kept.
        """
        known, usual = self.content(), type(self).model_fields
        facts = {
            name: "/".join(Path(value).parts[-2:]) if name in _FOLDERS and value else value
            for name, value in known.items()
            if name not in _PLACES and value != usual[name].get_default(call_default_factory=True)
        }
        return {"format": self.format} | facts


class OpenFiles:
    """The few files a process keeps open, by path; empty after pickling or forking, so no two share a position."""

    def __init__(self, limit: int = 16) -> None:
        self.limit = limit
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]

    def read(self, path: str | os.PathLike[str], offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``; fewer where the file ends. ``OSError`` when it cannot be read."""
        if self._owner != os.getpid():  # forked: the parent's handles share their position with it
            self._files, self._owner = OrderedDict(), os.getpid()
        key = os.fspath(path)
        file = self._files.pop(key, None) or open(key, "rb")  # noqa: SIM115 - kept open on purpose
        self._files[key] = file
        if len(self._files) > self.limit:
            self._files.popitem(last=False)[1].close()
        file.seek(offset)
        return file.read(length)


def decode_image(
    source: bytes | str | os.PathLike[str], where: str, options: ReadOptions, min_side: int = 1
) -> np.ndarray:
    """Decode a picture of a sample: ``(H, W, 3)`` uint8 RGB, upright, of its own size. ``where`` names it in errors.

    Raises:
        BadSample: missing_file, remote_file, empty_file, wrong_type, broken_image, too_large, too_small.
    """
    _refuse_remote(source, where)
    try:
        pixels = np.asarray(load_image(source, options.max_pixels))
    except (ValueError, OSError) as error:
        raise _bad_media(error, where, "broken_image") from error
    if min(pixels.shape[:2]) < min_side:
        raise BadSample("too_small", f"{where}: {pixels.shape[1]}x{pixels.shape[0]} pixels, smallest side {min_side}")
    return pixels


def decode_video(source: bytes | str | os.PathLike[str], where: str, options: ReadOptions) -> tuple[np.ndarray, ...]:
    """Decode ``options.num_frames`` evenly spread frames of a film, each ``(H, W, 3)`` uint8 RGB of its own size.

    Raises:
        BadSample: missing_file, remote_file, empty_file, wrong_type, broken_video, too_large.
    """
    _refuse_remote(source, where)
    try:
        frames = load_video(source, options.num_frames, limits=options.video_limits)
    except (ValueError, OSError) as error:
        raise _bad_media(error, where, "broken_video") from error
    return tuple(np.asarray(frame) for frame in frames)


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON of a sample.

    Raises:
        BadSample: bad_json, also for data too long or too deep to be a record; empty_file for no bytes.
    """
    if not data:
        raise BadSample("empty_file", f"{where}: empty where JSON is expected")
    if len(data) > MAX_JSON_BYTES:
        raise BadSample("bad_json", f"{where}: {len(data)} bytes of JSON, more than {MAX_JSON_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"{where}: not valid JSON ({str(error) or 'nested too deep'})") from error


def decode_text(data: bytes, where: str) -> str:
    """Return the text of a file of UTF-8.

    Raises:
        BadSample: missing_text - empty, blank, or not text.
    """
    try:
        return require_text(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise BadSample("missing_text", f"{where}: not UTF-8 text") from error


def require_text(value: Any, where: str) -> str:
    """Return a text stripped of blanks around it.

    Raises:
        BadSample: missing_text - not a string, or nothing but blanks.
    """
    if not isinstance(value, str) or not value.strip():
        shown = "is empty" if isinstance(value, str) else f"is {type(value).__name__}, not text"
        raise BadSample("missing_text", f"{where}: {shown if value is not None else 'is missing'}")
    return value.strip()


def require(record: Any, name: str, where: str) -> Any:
    """Return a field of a record; dots in ``name`` go into mappings (``meta.caption``).

    Raises:
        BadSample: bad_record - not a mapping, or the field is not there.
    """
    value = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(map(str, list(value)[:12])) if isinstance(value, Mapping) else type(value).__name__
            raise BadSample("bad_record", f"{where}: no field {name!r} (there is: {known or 'nothing'})")
        value = value[part]
    return value


def read_file(path: str | os.PathLike[str], where: str, limit: int = 2_000_000_000) -> bytes:
    """Return a whole file's bytes.

    Raises:
        BadSample: missing_file, empty_file, too_large.
    """
    try:
        size = os.stat(path).st_size
        if size > limit:
            raise BadSample("too_large", f"{where}: {size} bytes, more than {limit}")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("missing_file", f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from (
            error
        )
    if not data:
        raise BadSample("empty_file", f"{where}: the file is empty")
    return data


def captions_in(value: Any, where: str) -> list[str]:
    """Return the captions that a field holds: a text, a list of texts, or a mapping of names to texts.

    Raises:
        BadSample: missing_text - there is none.
    """
    if isinstance(value, Mapping):
        value = [value[name] for name in sorted(value, key=str)]
    if isinstance(value, list | tuple | np.ndarray):
        found = [item.strip() for item in value if isinstance(item, str) and item.strip()]
        if not found:
            raise BadSample("missing_text", f"{where}: none of {len(value)} captions has words")
        return found
    return [require_text(value, where)]


def image_text(sample_id: str, pixels: np.ndarray, captions: str | Sequence[str], **meta: Any) -> Sample:
    """Return a picture ``(H, W, 3)`` uint8 and its caption as a sample of form ``image_text``.

    A mixture may turn it round into ``text_image``; of several captions, which stand in ``meta["captions"]``, it takes
    another one each epoch.
    """
    several = (captions,) if isinstance(captions, str) else tuple(captions)
    turns = (Turn("user", (image(pixels),)), Turn("assistant", (text(several[0]),)))
    return Sample(sample_id, "image_text", turns, meta | ({"captions": several} if len(several) > 1 else {}))


def _refuse_remote(source: Any, where: str) -> None:
    if isinstance(source, str) and source.lower().startswith(("http://", "https://", "ftp://", "s3://", "gs://")):
        raise BadSample("remote_file", f"{where}: {source[:80]} is an address; download it first")


def _bad_media(error: Exception, where: str, broken: str) -> BadSample:
    if isinstance(error, FileNotFoundError):
        return BadSample("missing_file", f"{where}: {error}")
    kind = {"empty": "empty_file", "wrong_type": "wrong_type", "too_large": "too_large"}.get(
        error.kind if isinstance(error, MediaError) else "", broken
    )
    return BadSample(kind, f"{where}: {error}")
