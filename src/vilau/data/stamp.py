"""What the files of a source looked like: a digest by which codes made of them can tell that they changed in place.

Of names, sizes and some bytes, not of times: a copy on another machine has the same ones, whatever its clock says. Not
of pictures and films that records merely name: finding them means reading every record, and where their codes are
stored they need not be there any more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

_SIZED, _SAMPLED = 1 << 16, 1 << 12  # files whose sizes are asked for, and of which bytes are read, at most
_BLOCK, _BLOCKS = 4096, 16  # a file of 64 KiB or less is read whole


def files_stamp(source: object) -> str:
    """Return SHA-256 of the data files that a source was opened from, "" for one that names none as `files`.

    The cost is bounded: all names count, but only up to 65,536 sizes and the bytes of up to 4,096 files, evenly spread.
    """
    files: Sequence[str | os.PathLike[str]] | None = getattr(source, "files", None)
    if not files:
        return ""
    names = [os.fspath(file) for file in files]
    common = len(os.path.commonprefix([min(names), max(names)]).rpartition(os.sep)[0])  # noqa: RUF071 - cut at a folder
    digest = hashlib.sha256()
    for name in names:
        digest.update(name[common:].lstrip(os.sep).encode("utf-8", "surrogateescape") + b"\0")
    for name in _spread(names, _SIZED):
        digest.update(b"%d " % _size(name))
    blocks = max(2, min(_BLOCKS, _SAMPLED // len(names)))
    for name in _spread(names, _SAMPLED):
        for block in _bytes_of(name, blocks):
            digest.update(block)
    return digest.hexdigest()


def _spread(names: Sequence[str], count: int) -> Sequence[str]:
    return names[:: -(-len(names) // count)]


def _size(name: str) -> int:
    try:
        return os.stat(name).st_size
    except OSError:
        return -1  # a caption that is not beside its picture


def _bytes_of(name: str, blocks: int) -> Iterator[bytes]:
    """The whole of a small file; of a larger one its beginning, its end and blocks between, evenly spread."""
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _BLOCK * _BLOCKS:
                yield file.read()
                return
            for number in range(blocks):
                file.seek(number * (size - _BLOCK) // (blocks - 1))
                yield file.read(_BLOCK)
    except OSError:
        return
