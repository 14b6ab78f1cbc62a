"""Where indices of data files are kept: beside the data, or in a cache where that cannot be written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import atomic_path


def stamp(path: Path) -> list[int]:
    """Return size and time of the last change of a file: an index made for another stamp is made anew."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def places(path: Path, suffix: str, cache: Path | None) -> list[Path]:
    """Return where an index of a file may lie, the first choice first."""
    beside = path.with_name(f".{path.name}.{suffix}")
    whole = hashlib.sha256(os.fspath(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vilau" / "index"
    folders = [cache] if cache is not None else [user]
    elsewhere = [folder / f"{path.name[:60]}.{whole}.{suffix}" for folder in folders]
    return elsewhere if cache is not None else [beside, *elsewhere]


def write_first(targets: Sequence[Path], content: bytes) -> Path:
    """Write bytes to the first of some paths that can be written; the file appears whole or not at all.

    Raises:
        ValueError: none can be written.
    """
    reason = ""
    for number, target in enumerate(targets):
        try:
            if number or len(targets) == 1:
                target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                temporary.write_bytes(content)
            return target
        except OSError as error:
            reason = str(error)
    raise ValueError(f"cannot write an index ({reason}); name a folder that can be written as data.cache")


class NumberFile:
    """Whole numbers ``(N,)`` in a file, mapped when first asked for; pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = path.stat().st_size // 8
        self._numbers: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_count": self._count, "_numbers": None}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        if self._numbers is None:
            self._numbers = np.memmap(self.path, dtype="<i8", mode="r")
        return int(self._numbers[index])


def kept_numbers(
    path: Path, rules: Sequence[str], cache: Path | None, compute: Callable[[], Sequence[int] | np.ndarray]
) -> NumberFile:
    """Return the numbers of a file's samples that pass its filters; computed once per file, stamp and ``rules``."""
    name = hashlib.sha256(json.dumps([1, stamp(path), list(rules)]).encode()).hexdigest()[:16]
    targets = places(path, f"{name}.kept", cache)
    for target in targets:
        if target.is_file() and target.stat().st_size % 8 == 0:
            return NumberFile(target)
    numbers = np.ascontiguousarray(compute(), dtype="<i8")
    return NumberFile(write_first(targets, numbers.tobytes()))
