"""Where models are: the shipped one, a folder, or a hub id. Imports nothing, so that a wrong name fails at once."""

from __future__ import annotations

import os
from pathlib import Path

SHIPPED_MODEL = Path(__file__).parent / "assets" / "model"


def find_model(model: str | os.PathLike[str] | None = None) -> str | Path:
    """Return the folder of a model, or the hub id as it is; the shipped model's folder for ``None``.

    Raises:
        ValueError: there is no such model.
    """
    if model is None:
        if not (SHIPPED_MODEL / "config.json").is_file():
            raise ValueError(
                "this installation ships no model: train one with `vilau train configs/nano/nano-cpu.yaml` "
                "and name its folder"
            )
        return SHIPPED_MODEL
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        is_folder = exists = False
    if is_folder:
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a model: it holds no config.json")
        return path
    if exists:
        raise ValueError(f"{path} is not a model: a model is a folder with config.json and model.safetensors")
    name = str(model)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith("/"):
        raise ValueError(f"unknown model {name!r}: there is no such folder, and a hub id looks like owner/name")
    return name
