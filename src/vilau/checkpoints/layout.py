"""Which layout a folder has, and how a hub id becomes a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vilau.checkpoints.shards import read_json

Layout = Literal["ours", "released"]
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PROCESSOR_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md", "LICENSE*", "*.jinja")
PARTS = ("llm", "vision_tower", "mm_projector")  # of the released layout


def find_layout(folder: Path) -> Layout:
    """Return the layout of a folder.

    Raises:
        ValueError: it is neither; the message says what was expected.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    file = folder / "config.json"
    kind = read_json(file).get("model_type") if file.is_file() else None
    if kind == "vilau":
        return "ours"
    parts = [part for part in PARTS if (folder / part).is_dir()]
    if kind == "vila_u_llama" or (len(parts) == 3 and kind is None):
        missing = sorted(set(PARTS) - set(parts))
        if missing:
            raise ValueError(
                f"{folder} is a released checkpoint without {', '.join(missing)}; fetch the whole folder again"
            )
        return "released"
    if kind == "vilau_vision_tower":
        raise ValueError(f"{folder} is a vision tower alone; open it with VisionTower.from_pretrained")
    if kind is None and (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} looks like an RQ-VAE of the original project, which is a vision tower alone: open it with "
            "vilau.load_rqvae or turn it into a tower's folder with `vilau convert`"
        )
    found = f"its model_type is {kind!r}" if file.is_file() else "it holds no config.json"
    raise ValueError(
        f"{folder} is not a model of a known layout: {found}. Expected our layout (config.json with model_type "
        "'vilau', model.safetensors) or the released one (config.json with model_type 'vila_u_llama', llm/, "
        "vision_tower/, mm_projector/)"
    )


def resolve(model: str | os.PathLike[str], subfolder: str = "", files: Sequence[str] = MODEL_FILES, **hub: Any) -> Path:
    """Return the folder of a path or a hub id.

    Args:
        model: a folder, or ``owner/name`` on the hub.
        subfolder: of the folder or repository.
        files: patterns of what is fetched.
        hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as everywhere in the library;
            ``HF_HUB_OFFLINE`` is honoured.

    Raises:
        ValueError: no such folder, and nothing to be fetched.
    """
    path = Path(model)
    if path.is_dir():
        return path / subfolder if subfolder else path
    folder = _fetch(str(model), subfolder, files, hub)
    if files is MODEL_FILES:  # repositories often hold the same weights twice: `.bin` only where there is nothing else
        parts = PARTS if all((folder / part).is_dir() for part in PARTS) else ("",)
        bare = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
        if bare:
            folder = _fetch(str(model), subfolder, [f"{part}/*.bin" if part else "*.bin" for part in bare], hub)
    return folder


def _fetch(model: str, subfolder: str, files: Sequence[str], hub: dict[str, Any]) -> Path:
    """Fetch files of a hub repository that match the patterns, or take them from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    options = {name: hub[name] for name in HUB_OPTIONS if hub.get(name) is not None}
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
    try:
        fetched = Path(snapshot_download(model, allow_patterns=patterns, **options))
    except HFValidationError as error:
        raise ValueError(f"{model}: there is no such folder, and a hub id looks like owner/name") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{model}: there is no such folder, and it cannot be fetched from the hub ({reason})"
        ) from error
    return fetched / subfolder if subfolder else fetched
