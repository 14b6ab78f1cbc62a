"""`from_pretrained` of the vision tower alone: from its own folder, or out of a folder of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vilau.checkpoints.int8 import is_ours
from vilau.checkpoints.layout import HUB_OPTIONS, find_layout, resolve
from vilau.checkpoints.loading import check_fields, check_loaded, load_ours
from vilau.checkpoints.released import ReleasedCheckpoint
from vilau.checkpoints.rqvae import is_rqvae, load_rqvae
from vilau.checkpoints.shards import open_weights, read_json
from vilau.configuration import VilaUConfig, VisionTowerConfig

_PREFIX = "vision_tower."


def load_tower(library: Callable[..., Any], name: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a vision tower (and the loading facts with `output_loading_info`).

    Args:
        library: the library's `from_pretrained`, bound to the tower's class.
        name: a folder or a hub id of a tower, of a whole model in our layout, of one in the released layout, or of an
            RQ-VAE (see `load_rqvae`); or `None` with a `state_dict`. Of a whole model the tower's tensors alone are
            read.
        args, kwargs: of `from_pretrained`.

    Raises:
        ValueError: the folder is of no known layout, a file is missing or damaged, or its files do not fit each other.
    """
    if name is None:
        return library(name, *args, **kwargs)
    folder = resolve(name, kwargs.get("subfolder") or "", **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
    kwargs = {key: value for key, value in kwargs.items() if key not in (*HUB_OPTIONS, "subfolder")}
    if is_rqvae(folder):
        tower = load_rqvae(folder).tower
        return library(None, *args, config=tower.config, state_dict=tower.state_dict(), **kwargs)
    file = folder / "config.json"
    if file.is_file() and read_json(file).get("model_type") == VisionTowerConfig.model_type:
        return load_ours(library, folder, args, kwargs)
    config, weights = _released_tower(folder) if find_layout(folder) == "released" else _our_tower(folder)
    with_info = kwargs.pop("output_loading_info", False)
    kwargs.pop("use_safetensors", None)
    config = kwargs.pop("config", None) or config
    tower, info = library(None, *args, config=config, state_dict=weights, output_loading_info=True, **kwargs)
    check_loaded(folder, info)
    tower.name_or_path = tower.config.name_or_path = str(folder)
    return (tower, info) if with_info else tower


def _our_tower(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    stored = read_json(folder / "config.json")
    if "quantization_config" in stored and not is_ours(stored["quantization_config"]):
        raise ValueError(f"{folder} holds weights in few bits; take the vision tower out of the model they come from")
    check_fields(stored, folder / "config.json")
    weights = open_weights(folder)
    names = [name for name in weights.tensors if name.startswith(_PREFIX)]
    config: Any = VilaUConfig.from_pretrained(str(folder)).vision_config
    return config, {name.removeprefix(_PREFIX): weights.read(name) for name in names}


def _released_tower(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    checkpoint = ReleasedCheckpoint(folder)
    names = [name for name in checkpoint.shapes if name.startswith(_PREFIX)]
    return checkpoint.vision, {name.removeprefix(_PREFIX): checkpoint.read(name) for name in names}
