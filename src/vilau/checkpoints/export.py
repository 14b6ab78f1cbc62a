"""From a finished training stage to a folder for users: half-precision safetensors, settings, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vilau.checkpoints.shards import write_json
from vilau.checkpoints.target import check_target, partial_folder, put_in_place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEPT_FLOAT32 = "quantizer."
_WEIGHTS = "model.safetensors"
_SAMPLING = ("visual_guidance_scale", "visual_temperature", "visual_top_k", "visual_top_p")


def export_model(
    source: Path,
    target: Path,
    dtype: str = "bfloat16",
    sampling: Mapping[str, float] | None = None,
    card: str | None = None,
    force: bool = False,
) -> Path:
    """Write a model folder from the ``final`` folder of a language stage.

    The weights are stored in `dtype`, the codebook in float32. The configuration says float32, so that
    ``from_pretrained`` computes in float32 unless told otherwise.

    Args:
        source: a folder with ``config.json``, one ``model.safetensors`` and the processor's files.
        target: the new folder; it appears whole or not at all.
        dtype: `float32`, `bfloat16` or `float16`.
        sampling: defaults of visual sampling, stored in ``generation_config.json``: `visual_guidance_scale`,
            `visual_temperature`, `visual_top_k`, `visual_top_p`.
        card: text of the model card, written as ``README.md``.
        force: replace an existing target.

    Raises:
        ValueError: the source is no such folder, the target exists, or an argument is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    unknown = set(sampling or {}) - set(_SAMPLING)
    if unknown:
        raise ValueError(f"unknown sampling settings {sorted(unknown)}; known are {', '.join(_SAMPLING)}")
    missing = [name for name in ("config.json", _WEIGHTS, "processor_config.json") if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} is not the result of stage pretrain or sft: it has no {', '.join(missing)}")
    check_target(source, target, force)
    beside = partial_folder(target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weights = {
        name: tensor if name_is_codebook(name) or not tensor.is_floating_point() else tensor.to(DTYPES[dtype])
        for name, tensor in load_file(source / _WEIGHTS).items()
    }
    save_file(weights, beside / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "float32"
    config["architectures"] = ["VilaUForConditionalGeneration"]
    write_json(beside / "config.json", config)
    stored = source / "generation_config.json"
    generation: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    generation.pop("_from_model_config", None)  # the library would drop the sampling settings when loading
    tokens = {key: config["text_config"].get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(beside / "generation_config.json", tokens | generation | dict(sampling or {}))
    for path in source.iterdir():
        if path.name.startswith("tokenizer") or path.name in ("processor_config.json", "special_tokens_map.json"):
            shutil.copyfile(path, beside / path.name)
    if card is not None:
        (beside / "README.md").write_text(card, encoding="utf-8")
    return put_in_place(target)


def name_is_codebook(name: str) -> bool:
    """Return whether a tensor belongs to the quantizer, which stays in float32."""
    return _KEPT_FLOAT32 in name
