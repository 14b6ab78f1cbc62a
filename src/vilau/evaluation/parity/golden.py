"""A golden folder: what the reference was given and what it returned."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


class GoldenFolder:
    """Files of one golden folder, read when they are needed.

    Args:
        folder: with ``ckpt``, ``outputs.safetensors``, ``inputs.safetensors``, ``prompts.json``, ``meta.json`` and,
            for a trimmed copy, ``crops.json``: name -> ``[[start, stop], ...]`` per axis.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no checkpoint or outputs in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        for name in ("ckpt", "outputs.safetensors"):
            if not (folder / name).exists():
                raise ValueError(f"{folder} is no golden folder: it holds no {name}")
        self.outputs = self._open("outputs.safetensors")

    @property
    def checkpoint(self) -> Path:
        """The released checkpoint."""
        return self.folder / "ckpt"

    @cached_property
    def names(self) -> list[str]:
        """The tensors to be recomputed."""
        return sorted(self.outputs.keys())

    def expected(self, name: str) -> torch.Tensor:
        """What the reference returned."""
        return self.outputs.get_tensor(name)

    @cached_property
    def _inputs(self) -> Any:
        return self._open("inputs.safetensors")

    @cached_property
    def input_names(self) -> list[str]:
        """The tensors that the reference was given; empty without their file."""
        return sorted(self._inputs.keys()) if (self.folder / "inputs.safetensors").is_file() else []

    def given(self, name: str) -> torch.Tensor:
        """What the reference was given; ``ValueError`` if the folder does not hold it."""
        if name not in self.input_names:
            raise ValueError(f"{self.folder / 'inputs.safetensors'} holds no tensor {name!r}, which this check needs")
        return self._inputs.get_tensor(name)

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """Name -> messages, prompt and ids."""
        return self._json("prompts.json")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Sample descriptions, numbers, margins."""
        return self._json("meta.json")

    @cached_property
    def crops(self) -> dict[str, list[list[int]]]:
        """Slices kept of trimmed tensors."""
        return self._json("crops.json") if (self.folder / "crops.json").is_file() else {}

    def crop(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a whole tensor that this folder keeps."""
        if name not in self.crops:
            return tensor
        return tensor[tuple(slice(start, stop) for start, stop in self.crops[name])]

    def gradient_norms(self, case: str) -> dict[str, float]:
        """Parameter of the reference -> norm of its gradient on a batch; empty without the file."""
        name = f"grad_norms_{case}.json"
        return self._json(name) if (self.folder / name).is_file() else {}

    def picture(self, letter: str) -> Path:
        """The picture ``image_{letter}*`` beside the folder."""
        return self._media(f"image_{letter}*.png")[0]

    @cached_property
    def film(self) -> list[Path]:
        """All frames of the film beside the folder, in order."""
        return self._media("video_*/*.png")

    def _media(self, pattern: str) -> list[Path]:
        beside = (self.folder.absolute().parent, self.folder.resolve().parent)  # of a link, or of what it points to
        media = next((path / "media" for path in beside if (path / "media").is_dir()), beside[0] / "media")
        found = sorted(media.glob(pattern))
        if not found:
            raise ValueError(f"{media} holds no {pattern}, which this check needs")
        return found

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {self.folder / name}: {error}") from error

    def _json(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no {name}, which this check needs")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
