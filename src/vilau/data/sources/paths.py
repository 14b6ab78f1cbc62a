"""The files that a path stands for: one file, a folder, a glob or a range."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_files(path: str, suffix: str) -> list[Path]:
    """Return the files of a path: one file, a folder's files of a suffix (subfolders too), a glob, or ``{000..041}``.

    Raises:
        ValueError: there are none, or one of a range is missing.
    """
    ranged = _expand(path)
    if len(ranged) > 1:
        missing = [name for name in ranged if not Path(name).is_file()]
        if missing:
            raise ValueError(f"{path}: {len(missing)} of {len(ranged)} files are missing, the first is {missing[0]}")
        return [Path(name) for name in ranged]
    place = Path(path)
    if place.is_dir():
        found: Sequence[Path] = sorted(p for p in place.rglob(f"*{suffix}") if p.is_file() and p.name[0] != ".")
    elif place.is_file():
        found = [place]
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not found:
        reason = f"holds no {suffix} files" if place.is_dir() else "there is no such file or folder"
        raise ValueError(f"{path}: {reason}")
    return list(found)


def _expand(path: str) -> list[str]:
    match = _RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    width = len(first)
    return [
        name
        for number in numbers
        for name in _expand(f"{path[: match.start()]}{number:0{width}d}{path[match.end() :]}")
    ]
