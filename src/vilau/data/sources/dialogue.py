"""Rows of speakers with marks for pictures -> turns, checked: what all conversation formats share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ..sample import Part, Role, Sample, Turn, form_of, text
from .media import Media
from .records import Records, peek
from .source import BadSample, ReadOptions, SourceConfig

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_MARKS = re.compile(r"(<image>|<video>)")


@dataclass(frozen=True)
class Mark:
    """The place of a picture (``image``) or film (``video``) within a text; ``named`` where the place itself names
    it."""

    kind: str
    named: Any = None


Said = tuple[str, list[str | Mark]]  # speaker as the record calls it, and what is said


def find_marks(words: str) -> list[str | Mark]:
    """Cut a text at ``<image>`` and ``<video>``; blanks and line ends beside a mark are the template's business."""
    pieces = _MARKS.split(words)
    if len(pieces) == 1:
        return [words]
    found: list[str | Mark] = []
    for piece in pieces:
        if _MARKS.fullmatch(piece):
            found.append(Mark(piece[1:-1]))
        elif piece.strip():
            found.append(piece.strip())
    return found


def build_sample(
    sample_id: str, said: Sequence[Said], media: Mapping[str, Sequence[Any]], reader: Media, where: str, **meta: Any
) -> Sample:
    """Return the sample of a conversation; pictures and films are decoded last, when all else is known to be right.

    Args:
        said: the turns in order.
        media: names of pictures and films by kind, in the order of their marks.

    Raises:
        BadSample: unknown_role, turn_order, empty_answer, missing_text, image_count, and what is wrong with a file.
    """
    roles = _check_roles([speaker for speaker, _ in said], where)
    filled = _fill_marks(said, media, where)
    for number, (role, pieces) in enumerate(zip(roles, filled, strict=True)):
        if not any(isinstance(piece, Mark) or piece.strip() for piece in pieces):
            kind = "empty_answer" if role == "assistant" else "missing_text"
            raise BadSample(kind, f"{where}: turn {number} ({role}) says nothing")
    read: dict[str, Callable[[Any, str], Part]] = {"image": reader.image, "video": reader.video}
    turns = []
    for role, pieces in zip(roles, filled, strict=True):
        parts = [
            read[piece.kind](piece.named, f"{where}, {_short(piece.named)}")
            if isinstance(piece, Mark)
            else text(piece.strip() if len(pieces) == 1 else piece)
            for piece in pieces
            if isinstance(piece, Mark) or piece.strip()
        ]
        turns.append(Turn(role, tuple(parts)))
    return Sample(sample_id, form_of(turns), tuple(turns), meta)


def _short(named: Any) -> str:
    if isinstance(named, str) and not named.startswith("data:"):
        return named[-80:]
    return str(named.get("path") or "a picture") if isinstance(named, Mapping) else "a picture"


def _check_roles(speakers: Sequence[Any], where: str) -> list[Role]:
    """Roles in their order: perhaps a system, then user and assistant in turn, the assistant last."""
    roles: list[Role] = []
    for number, speaker in enumerate(speakers):
        role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise BadSample("unknown_role", f"{where}: turn {number} is by {str(speaker)[:40]!r}")
        roles.append(role)
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise BadSample("empty_answer", f"{where}: nobody says anything")
    expected: list[Role] = ["user", "assistant"] * (len(spoken) // 2 + 1)
    if spoken != expected[: len(spoken)]:
        raise BadSample("turn_order", f"{where}: {', '.join(spoken[:8])}; user and assistant must take turns")
    if spoken[-1] != "assistant":
        raise BadSample("empty_answer", f"{where}: the last question has no answer")
    return roles


def _fill_marks(said: Sequence[Said], media: Mapping[str, Sequence[Any]], where: str) -> list[list[str | Mark]]:
    """Give each mark that names nothing the next name of its kind; each kind must come out even."""
    rest = {kind: list(media.get(kind, ())) for kind in ("image", "video")}
    marks = dict.fromkeys(rest, 0)
    counts = {kind: len(names) for kind, names in rest.items()}
    filled: list[list[str | Mark]] = []
    for _, pieces in said:
        turn: list[str | Mark] = []
        for piece in pieces:
            if isinstance(piece, Mark) and piece.named is None:
                marks[piece.kind] += 1
                piece = Mark(piece.kind, rest[piece.kind].pop(0) if rest[piece.kind] else None)
            turn.append(piece)
        filled.append(turn)
    for kind in rest:
        if marks[kind] != counts[kind]:
            raise BadSample("image_count", f"{where}: {marks[kind]} marks <{kind}> for {counts[kind]} of them")
    return filled


def as_list(value: Any) -> list[Any]:
    """Nothing, one thing, or a list of things -> a list; empty names are nothing."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def read_conversation(record: Mapping[str, Any], where: str, marks: bool = True) -> list[Said]:
    """Turns of ``conversations`` (``from``/``value``) or ``messages`` (``role``/``content``), all of them text.

    Raises:
        BadSample: bad_record - there are none, or a turn has another shape.
    """
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list | tuple) or not turns:
        raise BadSample(
            "bad_record", f"{where}: neither `conversations` nor `messages` (there is: {', '.join(record)})"
        )
    said: list[Said] = []
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        said.append(("system", [system]))
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise BadSample("bad_record", f"{where}: turn {number} is {type(turn).__name__}, not a mapping")
        speaker = turn.get("from", turn.get("role"))
        words = turn.get("value", turn.get("content"))
        if words is None:
            words = ""
        if not isinstance(words, str):
            raise BadSample("bad_record", f"{where}: turn {number} says {type(words).__name__}, not text")
        said.append((speaker, find_marks(words) if marks else [words]))  # type: ignore[arg-type]
    return said


class RecordConfig(SourceConfig):
    """What formats of one record per sample share."""

    media: str | None = Field(
        None, description="folder that names of pictures and films are relative to; the record's own if absent"
    )

    @classmethod
    def looks_right(cls, records: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the first few records of a file are of this format."""
        return False

    @classmethod
    def detect(cls, path: Path) -> bool:
        records = list(peek(path))
        return bool(records) and cls.looks_right(records)


def media_folder(config: RecordConfig) -> Path | None:
    """The folder that a source's configuration names for pictures and films.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(config.media) if config.media else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"source {config.label!r}: there is no folder {folder} (media)")
    return folder


class RecordSource:
    """Samples of records, one each.

    Args:
        config: where they are.
        options: how they are read.
        records: them; opened from the configuration's path if absent.
    """

    def __init__(self, config: RecordConfig, options: ReadOptions, records: Records | None = None) -> None:
        self.name, self.options = config.label, options
        self.records = records or Records(config.path, options.cache)
        self._folder = media_folder(config)

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return self.records.paths

    def __len__(self) -> int:
        return len(self.records)

    def shard(self, index: int) -> str:
        return self.records.path(index).name

    def read(self, index: int) -> Sample:
        where = self.records.where(index)
        path = self.records.path(index)
        record = self.records.read(index)
        reader = Media(self._folder or path.parent, self.options)
        return self.parse(record, f"{self.name}/{index}", reader, where)

    @abstractmethod
    def parse(self, record: Mapping[str, Any], sample_id: str, reader: Media, where: str) -> Sample:
        """Return the sample of a record; ``BadSample`` for whatever is wrong with it."""


def has_any(record: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of these fields is there and holds something."""
    return any(record.get(name) not in (None, "", [], ()) for name in names)
