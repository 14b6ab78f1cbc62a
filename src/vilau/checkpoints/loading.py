"""`from_pretrained` for both layouts: what the library's own does, with a check that everything fits."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vilau.checkpoints.int8 import is_ours
from vilau.checkpoints.layout import HUB_OPTIONS, find_layout, resolve
from vilau.checkpoints.released import ReleasedCheckpoint
from vilau.checkpoints.released_config import LIBRARY
from vilau.checkpoints.shards import listed, open_weights, read_json
from vilau.configuration import DepthTransformerConfig, VilaUConfig, VisionTowerConfig

RELEASED_SAMPLING = {  # what the reference draws with
    "visual_guidance_scale": 3.0,
    "visual_temperature": 1.0,
    "visual_top_k": 900,
    "visual_top_p": 0.96,
}

_OF_LIBRARY = frozenset(
    ("auto_map", "quantization_config", "fusion_config", "distributed_config", "transformers_weights")
)


def load_pretrained(
    cls: type, library: Callable[..., Any], name: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Return a model (and the loading facts with `output_loading_info`), loaded through the library's own method.

    Args:
        cls: the class to be loaded.
        library: the library's `from_pretrained`, bound to that class.
        name: a folder, a hub id, or `None` with a `state_dict`.
        args, kwargs: of `from_pretrained`.

    Raises:
        ValueError: the folder is of neither layout, or its files do not fit each other.
    """
    if name is None or kwargs.get("gguf_file") is not None:
        return library(name, *args, **kwargs)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    folder = resolve(name, kwargs.get("subfolder") or "", **hub)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return library(name, *args, **kwargs)  # an adapter: the library finds its base model
    kwargs = {key: value for key, value in kwargs.items() if key not in (*HUB_OPTIONS, "subfolder")}
    if find_layout(folder) == "released":
        return _load_released(library, folder, args, kwargs)
    return load_ours(library, folder, args, kwargs)


def _load_released(library: Callable[..., Any], folder: Path, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    checkpoint = ReleasedCheckpoint(folder)
    with_info = kwargs.pop("output_loading_info", False)
    kwargs.pop("use_safetensors", None)
    given = kwargs.pop("config", None)
    model, info = library(
        None,
        *args,
        config=given if given is not None else checkpoint.config,
        state_dict=checkpoint.state_dict(),
        output_loading_info=True,
        **kwargs,
    )
    check_loaded(folder, info)
    model.name_or_path = model.config.name_or_path = str(folder)
    if "generation_config" not in kwargs:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig(**released_generation(folder))
    return (model, info) if with_info else model


def released_generation(folder: Path) -> dict[str, Any]:
    """Return the generation settings of a released folder: the language model's, and the reference's for codes."""
    file = folder / "llm" / "generation_config.json"
    stored = read_json(file) if file.is_file() else {}
    stored = {key: value for key, value in stored.items() if key not in ("transformers_version", "_from_model_config")}
    llm = folder / "llm" / "config.json"
    tokens = {key: read_json(llm).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {key: value for key, value in tokens.items() if value is not None} | stored | RELEASED_SAMPLING


def load_ours(library: Callable[..., Any], folder: Path, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Load a model or a tower from a folder of ours through the library's `from_pretrained`, and check that it fits."""
    with_info = kwargs.pop("output_loading_info", False)
    check_fields(read_json(folder / "config.json"), folder / "config.json")
    settings = (kwargs.get("quantization_config"), read_json(folder / "config.json").get("quantization_config"))
    foreign = any(setting is not None and not is_ours(setting) for setting in settings)
    if kwargs.get("variant") is None:
        open_weights(folder)  # truncated or missing shards are named before anything is built
    try:
        model, info = library(str(folder), *args, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        if "size mismatch" in str(error) or "mismatch" in str(error):
            raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
        raise
    if not foreign and not kwargs.get("ignore_mismatched_sizes"):
        check_loaded(folder, info)
    return (model, info) if with_info else model


def check_fields(stored: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for a field of our ``config.json`` that no configuration has, with the nearest right one."""
    kinds: dict[str, type] = {"": VisionTowerConfig}
    if stored.get("model_type") != VisionTowerConfig.model_type:
        kinds = {"": VilaUConfig, "vision_config": VisionTowerConfig, "depth_config": DepthTransformerConfig}
    for part, kind in kinds.items():
        fields = stored.get(part) or {} if part else stored
        known = {field.name for field in dataclasses.fields(kind)}
        for name in sorted(set(fields) - known - LIBRARY - _OF_LIBRARY):
            if name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, sorted(known), 1, 0.0)[0]
            where = f"{part}.{name}" if part else name
            raise ValueError(f"{file}: unknown field {where!r}; did you mean {near!r}? Correct or remove it")


def check_loaded(folder: str | os.PathLike[str], info: Mapping[str, Any] | Any) -> None:
    """Raise ValueError if the library's loading facts name tensors that are missing, left over or of another shape."""
    facts = info if isinstance(info, Mapping) else vars(info)
    wrong = {
        what: sorted(str(key) for key in facts.get(name) or ())
        for what, name in (
            ("missing", "missing_keys"),
            ("of no use", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
    }
    lines = [f"{len(names)} {what}: {listed(names)}" for what, names in wrong.items() if names]
    if lines:
        raise ValueError(
            f"{folder}: the weights do not fit config.json, so nothing was loaded. {'. '.join(lines)}. "
            "Fetch the folder again, or correct its config.json"
        )
