"""The tower suite: what a finished vision tower can do, as one result with its protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vilau.data.nano.world import World
from vilau.evaluation.features import FeatureExtractor, load_extractor
from vilau.evaluation.subject import weights_digest
from vilau.evaluation.tower import EncodeTexts, TowerFigures, ValidationSet, measure_tower
from vilau.evaluation.tower_data import nano_validation
from vilau.shipped import TOWER_TYPE, find_tower, model_type
from vilau.tower import VisionTower
from vilau.training.vision_tower import encode_captions

SUITE_VERSION = 1
PICTURES = 512


def run_tower_suite(
    model: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    extractor: str | None = None,
) -> dict[str, Any]:
    """Measure a tower on held-out pictures of the nano world; a repeat gives the same figures.

    Args:
        model: folder or hub id of a tower or a whole model; the shipped model if absent. Zero-shot and retrieval
            figures need a tower in a folder of its own, with its text encoder and tokenizer, as stage 1 saves it: the
            tokenizer of a whole model belongs to its language model.
        limit: at most so many pictures.
        extractor: as for `load_extractor`.

    Raises:
        ValueError: there is no such tower, or no such extractor.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tower = load_tower(model)
    tower.to(target)  # type: ignore[arg-type]
    features = load_extractor(extractor)
    pictures = PICTURES if limit is None else max(2, min(PICTURES, limit))
    data = nano_validation(World.load(), tower.config.image_size, pictures, seed)
    folder = Path(find_tower(model))
    left_out: dict[str, str] = {}
    if tower.text_encoder is not None and folder.is_dir() and model_type(folder) != TOWER_TYPE:
        left_out["zero_shot, retrieval"] = "a whole model brings no tokenizer for the captions of its tower"
    found = measure_finished(tower, find_tower(model), data, features, captions=not left_out)
    return {
        "suite": "tower",
        "suite_version": SUITE_VERSION,
        "metrics": {name: round(value, 4) for name, value in found.metrics.items()},
        "samples": found.items,
        "left_out": left_out,
        "chance": {name: round(value, 4) for name, value in data.chance().items() if name in found.metrics},
        "protocol": {
            "data": data.name,
            "extractor": features.name,
            "seed": seed,
            "limit": limit,
            "device": str(target),
            "model_sha256": weights_digest(find_tower(model), tower),
            "parameters": sum(parameter.numel() for parameter in tower.parameters()),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        },
    }


def measure_finished(
    tower: VisionTower,
    folder: str | Path,
    data: ValidationSet,
    extractor: FeatureExtractor | None,
    *,
    quantize: bool = True,
    reconstruct: bool = True,
    captions: bool = True,
) -> TowerFigures:
    """Measure a tower with the tokenizer that lies beside it; without a text encoder, pictures alone.

    `quantize` is False for a tower that was only aligned, `reconstruct` for one whose decoder was not trained,
    `captions` where pictures alone are to be measured.
    """
    encode = None
    if tower.text_encoder is not None and captions:
        try:
            encode = text_encoding(tower, AutoTokenizer.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds a tower with a text encoder but no tokenizer for it") from error
    return measure_tower(tower, data, encode, extractor, quantize=quantize, reconstruct=reconstruct)


def text_encoding(tower: VisionTower, tokenizer: Any) -> EncodeTexts:
    """Return texts -> token ids of the length that a tower's text encoder reads."""
    length = tower.config.text_encoder_config.max_position_embeddings

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return encode_captions(tokenizer, texts, length)

    return encode


def load_tower(model: str | os.PathLike[str] | None = None) -> VisionTower:
    """Return a tower in float32 and evaluation mode: from its own folder, or out of a whole model.

    Raises:
        ValueError: there is no such tower, or its files do not fit.
    """
    return VisionTower.from_pretrained(find_tower(model), dtype=torch.float32).eval()
