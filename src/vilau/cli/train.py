"""`vilau train`: wire data, model, engine and the pictures that show how a run is doing."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import typer
from PIL import Image

from vilau.cli.common import say
from vilau.configuration import VilaUConfig
from vilau.data.nano.scenes import contact_sheet
from vilau.evaluation.features import load_extractor
from vilau.evaluation.tower import ValidationSet
from vilau.evaluation.tower_data import nano_validation, pairs_validation
from vilau.evaluation.tower_pictures import reconstruction_rows
from vilau.evaluation.validation import TowerValidation
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.images import to_pixels
from vilau.training.config import TrainConfig, load_config
from vilau.training.data import load_world, validation_pairs
from vilau.training.engine import StopRequested, TrainingError
from vilau.training.language import LanguageStage
from vilau.training.run import Hooks, run
from vilau.training.stage import Stage
from vilau.training.vision_tower import TowerStage, to_pixel_values

PICTURE_PROMPTS = (
    "a red apple on a blue background",
    "a dog on a green background",
    "a panda on a purple background",
    "a rocket on a yellow background",
    "three bananas on a white background",
    "a cat left of a car on an orange background",
)
FILM_PROMPTS = ("a car moving right on a white background", "a frog growing on a blue background")


def train(config: Path, overrides: list[str]) -> None:
    """Train every stage of a configuration; print the folder of the last result on stdout."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = load_config(config, overrides)
    speaks = os.environ.get("RANK", "0") == "0"  # all processes of a run end alike: one line is enough
    try:
        result = run(settings, Hooks(draw_samples, tower_validation(settings)))
    except StopRequested as stopped:
        if speaks:
            say(f"{stopped}; the same command goes on from there")
        raise typer.Exit(stopped.exit_code) from None
    except TrainingError as error:
        if speaks:
            say(f"vilau train: {error}")
        raise typer.Exit(1) from None
    if speaks:
        typer.echo(str(result))


def tower_validation(config: TrainConfig) -> TowerValidation | None:
    """Return what measures the towers of a run, on held-out pictures; None for data of one's own without any."""
    if config.data.sources and not config.data.validation:
        return None

    def data(image_size: int) -> ValidationSet:
        if config.data.validation:
            return pairs_validation("data.validation", validation_pairs(config, image_size))
        return nano_validation(load_world(config), image_size, config.validation_samples)

    return TowerValidation(data, lambda: load_extractor(config.validation_extractor))


def draw_samples(stage: Stage, step: int, folder: Path) -> None:
    """Write a contact sheet of what the stage can do by now."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(stage, TowerStage):
        if not stage.reconstruct:
            return
        pixels = torch.from_numpy(np.stack([stage.source[number][0] for number in range(8)]))
        _sheet(*_reconstructions(stage.tower, pixels)).save(folder / f"step-{step:07d}.png")
    elif isinstance(stage, LanguageStage) and stage.model.vision_tower.quantizer.discrete:
        _sheet(*_drawings(stage.model, stage)).save(folder / f"step-{step:07d}.png")


def _reconstructions(tower: VisionTower, frames: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Rows of originals, then decodings of the first 1, 2 ... D code vectors: ``(rows * N, 3, S, S)``."""
    rows = reconstruction_rows(tower, to_pixel_values(frames).to(tower.device))
    names = ["original", *(f"depth {depth}" for depth in range(1, len(rows)))]
    return torch.cat(rows), [name for name in names for _ in range(len(frames))]


def _drawings(model: VilaUModel, stage: LanguageStage) -> tuple[torch.Tensor, list[str]]:
    """Pictures and film frames for the set prompts, by the weights as they are."""
    from vilau.model import VilaUForConditionalGeneration, VisualOutput

    with torch.device("meta"):
        painter: Any = VilaUForConditionalGeneration(cast(VilaUConfig, model.config))
    for name, part in model.named_children():
        setattr(painter, name, part)
    pictures, names = [], []
    for mode, prompts in (("image", PICTURE_PROMPTS), ("video", FILM_PROMPTS)):
        for prompt in prompts:
            inputs = stage.processor.apply_chat_template([{"role": "user", "content": prompt}], mode)
            drawn = painter.generate(**inputs.to(model.device), generation_mode=mode, seed=1)
            assert isinstance(drawn, VisualOutput)
            frames = drawn.pixel_values.reshape(-1, *drawn.pixel_values.shape[-3:])
            pictures.append(frames)
            names += [prompt] * len(frames)
    return torch.cat(pictures), names


def _sheet(pixel_values: torch.Tensor, names: list[str]) -> Image.Image:
    return contact_sheet(list(to_pixels(pixel_values.float().cpu().numpy())), names, columns=8, scale=4)
