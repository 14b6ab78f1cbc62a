"""From the `model` part of a training configuration to a `VilaUConfig`, with strict keys."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, SiglipTextConfig, SiglipVisionConfig

from vilau.configuration import DepthTransformerConfig, VilaUConfig, VisionTowerConfig
from vilau.training.config import TrainConfig


def build_config(config: TrainConfig, tokenizer: Any) -> VilaUConfig:
    """Return the model's configuration with what the tokenizer decides filled in.

    Raises:
        ValueError: a key that no configuration has; the nearest one that exists is named.
    """
    fields: dict[str, Any] = {**config.model}
    check_keys("model", fields, VilaUConfig)
    vision = fields.get("vision_config") or {}
    check_keys("model.vision_config", vision, VisionTowerConfig)
    check_keys("model.vision_config.image_encoder_config", vision.get("image_encoder_config"), SiglipVisionConfig)
    check_keys("model.depth_config", fields.get("depth_config"), DepthTransformerConfig)
    text = dict(fields.get("text_config") or {})
    text.setdefault("model_type", "llama")
    check_keys("model.text_config", text, type(AutoConfig.for_model(text["model_type"])))
    known = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return VilaUConfig(**{**fields, "text_config": known | text})


def require_sizes(config: TrainConfig) -> None:
    """Raise ValueError where a model has to be built and the configuration does not say of which sizes."""
    if not config.model:
        raise ValueError(
            "`model` is missing: give the sizes of a new model, or start from a finished one with "
            "stages.STAGE.init_from (a folder, or `shipped`)"
        )


def build_text_encoder_config(config: TrainConfig, tokenizer: Any, width: int) -> SiglipTextConfig:
    """Return the configuration of stage 1's text encoder, whose embeddings have the image encoder's `width`."""
    check_keys("text_encoder", config.text_encoder, SiglipTextConfig)
    known = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "projection_size": width}
    return SiglipTextConfig(**{**known, "bos_token_id": None, "eos_token_id": None, **config.text_encoder})


def check_keys(where: str, given: Mapping[str, Any] | None, kind: type) -> None:
    """Raise ValueError for the first key of `given` that the configuration class does not know."""
    known = {field.name for field in dataclasses.fields(kind)} | {"model_type"}
    for key in given or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise ValueError(f"unknown key '{where}.{key}'; did you mean {near!r}?")
