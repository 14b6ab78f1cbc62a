"""The index of a tar file: name, offset and length of every sample's members, so that any sample is one seek away.

webdataset's layout: files of one sample follow each other and share their name up to the first dot of its last part.
The index is built once by reading the headers, kept as a file, and itself read by seeking: neither a shard nor its
index is ever held in memory.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .index_files import places, stamp, write_first
from .source import BadSample, OpenFiles

logger = logging.getLogger(__name__)

_MAGIC = b"vilau-tar-index-1\n"
_HEAD = struct.Struct("<qqqq")  # size and time of the tar file, samples, length of the note
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class TarSample:
    """One sample of a shard: its key, and offset and length of each member by ending (``jpg``, ``json``, ``0.png``)."""

    key: str
    members: dict[str, tuple[int, int]]


class TarIndex:
    """The samples of one tar file by number.

    Args:
        path: of the tar file, not compressed.
        cache: folder for the index; None for beside the file.
        files: open files to share with other shards.

    ``note`` tells of a file that ends early: its whole samples are there. Raises ``ValueError`` for a file that is no
    tar file or a compressed one.
    """

    def __init__(self, path: Path, cache: Path | None = None, files: OpenFiles | None = None) -> None:
        self.path = path
        self._files = files or OpenFiles()
        wanted = stamp(path)
        for target in places(path, "index", cache):
            if self._accept(target, wanted):
                return
        samples, note = _scan(path)
        target = write_first(places(path, "index", cache), _serialise(samples, note, wanted))
        accepted = self._accept(target, wanted)
        assert accepted, f"{target} is not the index that was written"

    def _accept(self, target: Path, wanted: list[int]) -> bool:
        try:
            with target.open("rb") as file:
                head = file.read(len(_MAGIC) + _HEAD.size)
                if len(head) < len(_MAGIC) + _HEAD.size or not head.startswith(_MAGIC):
                    return False
                size, time, count, note = _HEAD.unpack(head[len(_MAGIC) :])
                if [size, time] != wanted or count < 0 or not 0 <= note < 10_000:
                    return False
                self.note = file.read(note).decode("utf-8", "replace")
                length = file.seek(0, os.SEEK_END)
        except OSError:
            return False
        self._table = len(head) + note
        self._records = self._table + 8 * (count + 1)
        if length < self._records:
            return False
        self._file, self._count = target, count
        return bool(length == self._records + self._offsets(count, 1)[0])

    def __len__(self) -> int:
        return self._count

    def _offsets(self, first: int, count: int) -> tuple[int, ...]:
        data = self._files.read(self._file, self._table + 8 * first, 8 * count)
        return struct.unpack(f"<{count}q", data) if len(data) == 8 * count else (-1,) * count

    def sample(self, number: int) -> TarSample:
        """Return where the members of a sample lie.

        Raises:
            IndexError: the number is out of range.
        """
        if not 0 <= number < self._count:
            raise IndexError(f"sample {number} is out of range: {self.path.name} has {self._count}")
        start, end = self._offsets(number, 2)
        key, members = json.loads(self._files.read(self._file, self._records + start, end - start))
        return TarSample(key, {ending: (offset, length) for ending, offset, length in members})

    def read(self, sample: TarSample, ending: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            BadSample: missing_file - the member is not there, or the file ends before it does.
        """
        where = f"{self.path.name}:{sample.key}.{ending}"
        if ending not in sample.members:
            raise BadSample("missing_file", f"{where}: not in the shard (it has {', '.join(sample.members)})")
        offset, length = sample.members[ending]
        try:
            data = self._files.read(self.path, offset, length)
        except OSError as error:
            raise BadSample("missing_file", f"{where}: cannot be read ({error.strerror})") from error
        if len(data) < length:
            raise BadSample("missing_file", f"{where}: the shard ends within it")
        return data


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and ending at the first dot of its last part, as webdataset does."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return folder + slash + key, ending.lower()


def _scan(path: Path) -> tuple[list[TarSample], str]:
    """Read all headers; what cannot be followed to the end gives what came before, and a note."""
    with path.open("rb") as file:
        kind = _COMPRESSED.get(file.read(2))
    if kind is not None:
        raise ValueError(f"{path} is a {kind} file: samples are reached by seeking, so unpack it to a plain tar first")
    samples: list[TarSample] = []
    note = ""
    try:
        for name, offset, length in _members(path):
            key, ending = split_name(name)
            if not ending:
                continue
            if not samples or samples[-1].key != key or ending in samples[-1].members:
                samples.append(TarSample(key, {}))
            samples[-1].members[ending] = (offset, length)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if not samples:
            raise ValueError(f"{path} is not a readable tar file: {error}") from error
        note = f"ends early or is damaged ({error}): only {len(samples)} samples can be reached"
        logger.warning("%s %s", path, note)
    return samples, note


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None:
            if member.isreg():
                yield member.name, member.offset_data, member.size
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _serialise(samples: list[TarSample], note: str, wanted: list[int]) -> bytes:
    records: list[bytes] = []
    offsets = [0]
    for sample in samples:
        members: list[Any] = [[ending, *place] for ending, place in sample.members.items()]
        records.append(json.dumps([sample.key, members], separators=(",", ":")).encode())
        offsets.append(offsets[-1] + len(records[-1]))
    text = note.encode()[:9_999]
    head = _MAGIC + _HEAD.pack(*wanted, len(samples), len(text)) + text
    return head + struct.pack(f"<{len(offsets)}q", *offsets) + b"".join(records)
