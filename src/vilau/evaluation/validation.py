"""Validation while a tower trains: a callable for the engine that measures, logs and leaves `validation.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from vilau.evaluation.features import FeatureExtractor
from vilau.evaluation.tower import ValidationSet, measure_tower
from vilau.files import write_json
from vilau.training.stage import Stage
from vilau.training.vision_tower import TowerStage, encode_captions

SUMMARY = "validation.json"


class TowerValidation:
    """Measure the tower of a stage; other stages have no figures here.

    Args:
        make_data: image size -> the pictures; called at the first validation.
        make_extractor: -> the features of the Fréchet distance; called when a tower reconstructs.

    The summary in the stage's folder holds the last validation: step, figures, pictures behind each, chance, names of
    the data and of the feature extractor.
    """

    def __init__(
        self, make_data: Callable[[int], ValidationSet], make_extractor: Callable[[], FeatureExtractor]
    ) -> None:
        self.make_data, self.make_extractor = lru_cache(make_data), lru_cache(make_extractor)

    def __call__(self, stage: Stage, step: int, folder: Path) -> dict[str, float]:
        """Return the figures of a stage's tower as it is, after a step."""
        if not isinstance(stage, TowerStage):
            return {}

        def encode(texts: Sequence[str]) -> torch.Tensor:
            return encode_captions(stage.tokenizer, texts, stage.text_length)

        extractor = self.make_extractor() if stage.reconstruct else None
        data = self.make_data(stage.tower.config.image_size)
        found = measure_tower(
            stage.tower, data, encode, extractor, quantize=stage.quantize, reconstruct=stage.reconstruct
        )
        summary = {
            "step": step,
            "data": data.name,
            "extractor": extractor.name if extractor is not None else None,
            "metrics": found.metrics,
            "items": found.items,
            "chance": data.chance(),
        }
        write_json(summary, folder / SUMMARY)
        return found.metrics
