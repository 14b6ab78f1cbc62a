"""The folder that a conversion writes: refused where it would do harm, built beside its place, moved when whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from vilau.files import open_to_readers


def check_target(source: Path, target: Path, force: bool) -> None:
    """Refuse a target before any work.

    Raises:
        ValueError: it exists and `force` is not given, is no model's folder, or lies in the source or around it.
    """
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"{target} and the source {source} must not lie in each other; choose another folder")
    if not target.exists():
        return
    if not force:
        raise ValueError(f"{target} exists; choose another folder or pass --force")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ValueError(f"{target} exists and is no model's folder, so it is not replaced; choose another folder")


def partial_folder(target: Path) -> Path:
    """Return where a target is built."""
    return target.with_name(f".{target.name}.partial")


def put_in_place(target: Path) -> Path:
    """Move the whole new folder to its place; what was there is removed last."""
    open_to_readers(partial_folder(target))
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial_folder(target).rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
