"""Data sets of the hub's kind for chats with pictures: ``messages`` beside ``images``, as parquet, JSON or JSONL.

A message's ``content`` is a text, in which ``<image>`` and ``<video>`` mark places, or a list of parts: ``{"type":
"text", "text": ...}`` and ``{"type": "image"}``. An image part may name its own picture (``image``, ``path``, ``url``,
``image_url``) or one of ``images`` by ``index``; otherwise the pictures follow the order of their places. A picture
that a part names and ``images`` lists again is one picture.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from ..sample import Sample
from .dialogue import Mark, RecordConfig, RecordSource, Said, as_list, build_sample, find_marks, has_any
from .media import Media
from .parquet import GroupCache, open_parquet
from .paths import find_files
from .records import Records, peek
from .source import BadSample, ReadOptions, Source

COLUMNS = ("messages", "conversations", "images", "image", "videos", "video")
_KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_NAMES = ("image", "video", "path", "url", "bytes", "image_url", "video_url")


class MessagesConfig(RecordConfig):
    """Chats with pictures, one per row."""

    format: Literal["messages"] = "messages"
    cache_bytes: int = 256_000_000

    def open(self, options: ReadOptions) -> Source:
        files = find_files(self.path, ".parquet") if _is_parquet(Path(self.path)) else None
        return MessagesSource(self, options, ParquetRecords(files, self.cache_bytes) if files else None)

    @classmethod
    def detect(cls, path: Path) -> bool:
        if _is_parquet(path):
            names = open_parquet(find_files(str(path), ".parquet")[0]).schema_arrow.names
            return "messages" in names
        records = list(peek(path))
        return bool(records) and cls.looks_right(records)

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        listed = any(
            isinstance(message, Mapping) and isinstance(message.get("content"), list)
            for record in records
            for message in as_list(record.get("messages"))
        )
        shown = any(has_any(record, ("images", "image", "videos", "video")) for record in records)
        return all("messages" in record for record in records) and (listed or shown)


class MessagesSource(RecordSource):
    """Messages whose pictures stand in their parts, or beside them."""

    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        messages = record.get("messages")
        if messages is None:
            messages = record.get("conversations")
        if not isinstance(messages, list | tuple) or not messages:
            raise BadSample("bad_record", f"{where}: no messages (there is: {', '.join(record)})")
        media = {kind: as_list(record.get(f"{kind}s")) or as_list(record.get(kind)) for kind in ("image", "video")}
        used: dict[str, set[int]] = {kind: set() for kind in media}
        said = [self._said(message, media, used, f"{where}, message {n}") for n, message in enumerate(messages)]
        rest = {kind: _unclaimed(kind, names, used[kind], said) for kind, names in media.items()}
        return build_sample(sample_id, said, rest, reader, where)

    @staticmethod
    def _said(message: Any, media: Mapping[str, list[Any]], used: dict[str, set[int]], where: str) -> Said:
        if not isinstance(message, Mapping):
            raise BadSample("bad_record", f"{where}: {type(message).__name__}, not a mapping")
        speaker = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, str) or content is None:
            return speaker, find_marks(content or "")  # type: ignore[return-value]
        if not isinstance(content, list | tuple):
            raise BadSample("bad_record", f"{where}: content is {type(content).__name__}, neither text nor parts")
        return speaker, [_part(part, media, used, where) for part in content]  # type: ignore[return-value]


def _unclaimed(kind: str, listed: Sequence[Any], used: set[int], said: Sequence[Said]) -> list[Any]:
    """What is listed for the parts that name nothing: without what parts point at, or name and the list names again."""
    rest = [name for n, name in enumerate(listed) if n not in used]
    marks = [piece for _, pieces in said for piece in pieces if isinstance(piece, Mark) and piece.kind == kind]
    named = [mark.named for mark in marks if mark.named is not None]
    for n in used:
        if listed[n] in named:  # not a null that a part points at
            named.remove(listed[n])
    for name in map(_plain, named):
        again = next((n for n, other in enumerate(rest) if _plain(other) == name), None)
        if again is not None and len(rest) > sum(mark.named is None for mark in marks):
            del rest[again]
    return rest


def _plain(named: Any) -> Any:
    """A picture's name or bytes, however it is wrapped."""
    if isinstance(named, Mapping):
        named = named.get("bytes") or named.get("path") or named.get("url")
    return named.removeprefix("file://") if isinstance(named, str) else named


def _part(part: Any, media: Mapping[str, list[Any]], used: dict[str, set[int]], where: str) -> str | Mark:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        words = part.get("text")
        if not isinstance(words, str):
            raise BadSample("bad_record", f"{where}: a text part without text")
        return words
    if kind not in _KINDS:
        raise BadSample("bad_record", f"{where}: a part of type {str(kind)[:40]!r}; text, image and video are known")
    kind = _KINDS[kind]
    named = next((part[name] for name in _NAMES if part.get(name) is not None), None)
    if isinstance(named, Mapping) and isinstance(named.get("url"), str):
        named = named["url"]
    place = part.get("index")
    if named is None and isinstance(place, int) and not isinstance(place, bool):
        if not 0 <= place < len(media[kind]):
            raise BadSample("image_count", f"{where}: {kind} {place} of {len(media[kind])}")
        used[kind].add(place)
        named = media[kind][place]
    return Mark(kind, named)


class ParquetRecords(Records):
    """Rows of parquet files as mappings; the row groups read last are kept."""

    def __init__(self, paths: Sequence[Path], cache_bytes: int) -> None:
        self.paths = list(paths)
        self._groups: list[list[int]] = []
        names: list[str] = []
        for path in paths:
            file = open_parquet(path)
            sizes = (file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups))
            self._groups.append(list(accumulate(sizes, initial=0)))
            names = names or file.schema_arrow.names
        self._ends = list(accumulate(ends[-1] for ends in self._groups))
        if not self._ends[-1]:
            raise ValueError(f"{paths[0].parent}: the parquet files hold no rows")
        self._columns = [name for name in COLUMNS if name in names]
        if not {"messages", "conversations"} & set(self._columns):
            raise ValueError(f"{paths[0]} has no column `messages`; there are {', '.join(names)}")
        self._cache = GroupCache(self._columns, cache_bytes)

    def read(self, index: int) -> Mapping[str, Any]:
        file, row = self.find(index)
        ends = self._groups[file]
        group = bisect_right(ends, row) - 1
        try:
            columns = self._cache.get(self.paths[file], group)
        except (OSError, ValueError, KeyError) as error:
            raise BadSample("bad_record", f"{self.where(index)}: its row group cannot be read ({error})") from error
        return {name: column[row - ends[group]].as_py() for name, column in zip(self._columns, columns, strict=True)}


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
