"""Where models are: the shipped one, a folder, or a hub id. Imports nothing heavy: a wrong name fails at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL_TYPE = "vilau"
TOWER_TYPE = "vilau_vision_tower"  # a vision tower alone, as stage 1 leaves it
PARTS = ("vision_config", "text_config", "depth_config")
RELEASED_TYPE = "vila_u_llama"  # the layout that VILA-U's authors publish
RELEASED_PARTS = ("llm", "vision_tower", "mm_projector")
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
    return _find(model, _check_folder)


def find_tower(model: str | os.PathLike[str] | None = None) -> str | Path:
    """Return the folder that holds a vision tower, alone or in a whole model, or the hub id as it is.

    Raises:
        ValueError: there is no such tower.
    """
    return find_model(None) if model is None else _find(model, _check_tower_folder)


def _find(model: str | os.PathLike[str], check: Callable[[Path], None]) -> str | Path:
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        is_folder = exists = False
    if is_folder:
        check(path)
        return path
    if exists:
        raise ValueError(f"{path} is not a model: a model is a folder with config.json and model.safetensors")
    name = str(model)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith("/"):
        raise ValueError(f"unknown model {name!r}: there is no such folder, and a hub id looks like owner/name")
    return name


def model_type(path: Path) -> str | None:
    """Return the `model_type` of a folder's ``config.json``; None where it has none.

    Raises:
        ValueError: there is no such file, or it is no JSON.
    """
    return _read_config(path).get("model_type")


def _check_tower_folder(path: Path) -> None:
    if model_type(path) != TOWER_TYPE:
        _check_folder(path)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a model: it holds no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _check_folder(path: Path) -> None:
    """Refuse what is no model of this kind: the library would fill the gaps with defaults of many gigabytes."""
    config = _read_config(path)
    kind = config.get("model_type")
    if kind == RELEASED_TYPE:
        absent = [part for part in RELEASED_PARTS if not (path / part).is_dir()]
        if absent:
            raise ValueError(
                f"{path} is a released checkpoint without {', '.join(absent)}: fetch the whole folder again"
            )
        return
    if kind != MODEL_TYPE:
        raise ValueError(f"{path} holds a model of another kind: its model_type is {kind!r} and not {MODEL_TYPE!r}")
    missing = [part for part in PARTS if not isinstance(config.get(part), dict)]
    if missing:
        raise ValueError(f"{path / 'config.json'} is not complete: it has no {', '.join(missing)}")
