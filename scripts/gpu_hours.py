"""Estimate the GPU-hours of a configuration's stages, counted from operations and not measured.

    python scripts/gpu_hours.py configs/paper/vila-u-7b-256.yaml --peak 989 --mfu 0.4

A stage takes steps x batch_size samples. What a sample holds is assumed, see `ASSUMED`; perceptual loss, discriminator
and padding are not counted, nor are recomputed blocks.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from transformers import SiglipTextConfig

from vilau.configuration import VilaUConfig
from vilau.modeling.vila_u import VilaUModel
from vilau.training.config import LanguageStageConfig, TrainConfig, load_config
from vilau.training.flops import LanguageFlops, tower_flops


@dataclass(frozen=True)
class Held:
    """What a sample of a form is taken to hold: text tokens, supervised ones among them, pictures, drawn ones."""

    text: int
    supervised: int
    pictures: int
    drawn: int


ASSUMED = {
    "image_text": Held(140, 100, 1, 0),
    "text_image": Held(100, 3, 1, 1),
    "text_video": Held(100, 3, 8, 8),
    "video_text": Held(160, 100, 8, 0),
    "interleaved": Held(500, 490, 5, 0),
    "text": Held(400, 250, 0, 0),
}


def tower_hours(config: TrainConfig, name: str, rate: float) -> tuple[float, float]:
    """Return total operations and GPU-hours of a stage of the vision tower."""
    sizes = VilaUConfig(**config.model).vision_config
    sizes.text_encoder_config = SiglipTextConfig(**config.text_encoder)
    stage = config.stages[name]  # type: ignore[literal-required]
    total = tower_flops(sizes).training_step * stage.steps * stage.batch_size
    return total, total / rate / 3600


def language_hours(config: TrainConfig, name: str, rate: float) -> tuple[float, float]:
    """Return total operations and GPU-hours of a language stage whose pictures are encoded as they come."""
    with torch.device("meta"):
        model = VilaUModel(VilaUConfig(**config.model))
    model.vision_tower.requires_grad_(False)
    flops, sizes = LanguageFlops(model), model.config.vision_config
    stage = config.stages[name]  # type: ignore[literal-required]
    weights = {form: weight / sum(stage.mixture.values()) for form, weight in stage.mixture.items()}
    each = 0.0
    for form, weight in weights.items():
        held = ASSUMED[form]
        positions = held.pictures * sizes.num_positions
        tokens, codes = held.text + positions, held.drawn * sizes.num_positions * sizes.depth
        pairs = tokens * (tokens + 1) / 2
        each += weight * flops(tokens, pairs, positions, held.supervised, codes, held.pictures)
    total = each * stage.steps * stage.batch_size
    return total, total / rate / 3600


def main() -> None:
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of one GPU in bfloat16; 989 is an H100's")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    rate = arguments.peak * 1e12 * arguments.mfu
    for name, stage in config.stages.items():
        hours = language_hours if isinstance(stage, LanguageStageConfig) else tower_hours
        total, needed = hours(config, name, rate)
        samples = stage.steps * stage.batch_size / 1e6  # type: ignore[attr-defined]
        print(f"{name}: {samples:.1f} M samples, {total:.2e} operations, {needed:.0f} GPU-hours")


if __name__ == "__main__":
    main()
