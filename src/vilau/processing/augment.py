"""How pictures of any size become the model's square: for the tower with augmentation, for samples by their form.

Augmentation is a pure function of a key (seed, epoch and sample), so any process and any resumed run sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..data.permutation import hash64
from ..data.sample import Part, Sample, holds_codes
from .images import SquareMode, resize_square

_TRIES = 10


class AugmentConfig(BaseModel):
    """What happens to a picture before the tower sees it."""

    model_config = ConfigDict(extra="forbid")

    resize: SquareMode = Field("squash", description="squash: the whole picture, aspect not kept; crop: centre square")
    crop: Literal["none", "random"] = Field("none", description="random: a random part, in place of `resize`")
    scale: tuple[float, float] = Field((0.6, 1.0), description="share of the area that a random part has")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="its width over its height, before the resize")
    flip: float = Field(0.0, ge=0, le=1, description="share of pictures that are mirrored; mind words like 'left'")

    @field_validator("scale", "ratio")
    @classmethod
    def _rises(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if not 0 < limits[0] <= limits[1]:
            raise ValueError(f"needs two numbers above 0 of which the second is not smaller, not {list(limits)}")
        return limits

    @field_validator("scale")
    @classmethod
    def _is_share(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if limits[1] > 1:
            raise ValueError(f"a part cannot be larger than the picture: {limits[1]} must be at most 1")
        return limits


def augment(pixels: np.ndarray, size: int, config: AugmentConfig, *key: object) -> np.ndarray:
    """Return pixels ``(H, W, 3)`` uint8 as a square ``(size, size, 3)`` uint8, changed at random by ``key``."""
    generator = np.random.Generator(np.random.PCG64(hash64("augment", *key)))
    picture = Image.fromarray(pixels)
    if config.crop == "random":
        box = _random_box(picture.size, config, generator)
        picture = picture.crop(box)  # cut first: a resize with a box would look beyond its border
        picture = resize_square(picture, size, "squash")
    else:
        picture = resize_square(picture, size, config.resize)
    if config.flip and generator.random() < config.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture).copy()


def _random_box(
    size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of random area and aspect; the centre square if none fits."""
    width, height = size
    for _ in range(_TRIES):
        area = width * height * generator.uniform(*config.scale)
        ratio = math.exp(generator.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(generator.integers(0, width - wide + 1))
            top = int(generator.integers(0, height - high + 1))
            return left, top, left + wide, top + high
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def fit_sample(sample: Sample, size: int) -> Sample:
    """Return a sample with every frame brought to ``(size, size, 3)``; frames that hold codes stay as they are.

    Where the assistant shows pictures or films, all frames of the sample are cut to the centre square, so that what is
    learnt to be drawn is not distorted and what is edited lies over what it becomes. All other frames are squashed.
    """
    drawn = any(part.frames for turn in sample.turns if turn.role == "assistant" for part in turn.parts)
    mode: SquareMode = "crop" if drawn else "squash"
    turns = tuple(replace(turn, parts=tuple(_fit(part, size, mode) for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=turns)


def _fit(part: Part, size: int, mode: SquareMode) -> Part:
    return replace(part, frames=fit_frames(part.frames, size, mode)) if part.frames else part


def fit_frames(frames: Sequence[np.ndarray], size: int, mode: SquareMode) -> tuple[np.ndarray, ...]:
    """Return frames ``(H, W, 3)`` uint8 as squares ``(size, size, 3)``, those that hold codes as ``(P, D)``."""
    return tuple(_fit_frame(frame, size, mode) for frame in frames)


def _fit_frame(frame: np.ndarray, size: int, mode: SquareMode) -> np.ndarray:
    if holds_codes(frame):
        return frame if frame.ndim == 2 else frame[0 if mode == "squash" else 1]
    if frame.shape == (size, size, 3):
        return frame
    return np.asarray(resize_square(Image.fromarray(frame), size, mode)).copy()
