"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(target: Path, durable: bool = False) -> Iterator[Path]:
    """A fresh name beside ``target``, renamed to it when the block ends well and removed when it does not.

    durable: the content is on the disk before the name is, so that not even a power cut leaves an empty file.

    Raises:
        FileNotFoundError: there is no folder to write into. ValueError: the target is a folder.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into: create it first")
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder")
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == temporary:  # a name that nobody gave says nothing
            raise OSError(error.errno, f"cannot write {target}: {error.strerror}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, target: Path, durable: bool = False) -> None:
    """Write a text file that appears whole or not at all; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: Any, target: Path, durable: bool = False) -> None:
    """Write a JSON file that appears whole or not at all; its folder is made."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", target, durable)


def open_to_readers(folder: Path) -> None:
    """Give the files of a folder the permissions of new files: safetensors lets only the owner read what it writes."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o666 & ~mask)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
