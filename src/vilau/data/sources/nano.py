"""The nano world as a source beside others: sample ``i`` is drawn when it is read, a function of the seed and ``i``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ..nano.dataset import ALL_FORM_OF, ImageTextDataset, NanoDataset
from ..nano.world import HELDOUT, TRAIN, World
from ..permutation import unit
from ..sample import Sample
from .source import ReadOptions, Source, SourceConfig, image_text

PICTURES = "pictures"
FORM_NAMES: tuple[str, ...] = (*ALL_FORM_OF, PICTURES)
_PICTURE_JITTER = 2.0


class NanoConfig(SourceConfig):
    """Scenes of emoji with captions, questions, films and stories; none shows what is held out."""

    format: Literal["nano"] = "nano"
    path: str = Field("", description="folder made by `vilau data nano`; data.world, or what ships, if empty")
    forms: dict[str, float] | None = Field(
        default_factory=lambda: {"image_text": 1.0, "text_image": 1.0},
        description="nano data form -> share; also `pictures`: what the tower's stages see of the nano world",
    )
    samples: int = Field(100_000, ge=1, description="how many there are: an epoch of this source")
    seed: int = Field(0, ge=0, description="another seed, other samples")
    objects: int = Field(48, ge=4, le=48, description="data.objects if absent")
    styles: list[str] = Field(default_factory=lambda: ["noto"], min_length=1, description="data.styles if absent")
    jitter: float | None = Field(
        None, ge=0, description="shift of objects, up to so many 1/32 of the side; 0, and 2 for `pictures`, if absent"
    )
    image_size: int | None = Field(None, ge=8, le=1024, description="side of the pictures; the model's if absent")

    @field_validator("forms")
    @classmethod
    def _are_ways_round(cls, forms: dict[str, float] | None) -> dict[str, float] | None:
        """In place of the two ways round of other formats: any forms of the nano world."""
        if not forms or min(forms.values()) <= 0:
            raise ValueError("needs at least one form, each with a share above 0: leave out the others")
        for name in forms:
            if name not in FORM_NAMES:
                near = difflib.get_close_matches(name, FORM_NAMES, 1, 0.0)[0]
                raise ValueError(f"the nano world has no form {name!r}; did you mean {near!r}?")
        return forms

    def open(self, options: ReadOptions) -> Source:
        return NanoSource(self, options)

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (path / "sprites.zip").is_file() and (path / "manifest.json").is_file()

    @property
    def label(self) -> str:
        return self.name or "nano"

    @property
    def ways_round(self) -> None:
        """Samples are drawn in their forms and stay as they are."""

    def content(self) -> dict[str, Any]:
        return super().content() | {"forms": self.forms}


class NanoSource:
    """Samples drawn at the model's size, of the training split or, where options say so, of the held-out one.

    Raises:
        ValueError: there are no sprites, a style is none, or a form's package is missing.
    """

    def __init__(self, config: NanoConfig, options: ReadOptions) -> None:
        self.name, self.seed = config.label, config.seed
        shares: Mapping[str, float] = config.forms or {}
        try:
            self.world = World.load(config.path or None, objects=config.objects, styles=tuple(config.styles))
        except ValueError as error:
            raise ValueError(f"source {self.name!r}: {error}") from error
        self._size, split = config.samples, HELDOUT if options.held_out else TRAIN
        side = config.image_size or options.image_size
        told = {name: share for name, share in shares.items() if name != PICTURES}
        self._pictures: ImageTextDataset | None = None
        self._told: NanoDataset | None = None
        if PICTURES in shares:
            jitter = _PICTURE_JITTER if config.jitter is None else config.jitter
            self._pictures = ImageTextDataset(self.world, split, self.seed, side, self._size, jitter=jitter)
        if told:
            jitter = config.jitter or 0.0
            self._told = NanoDataset(
                self.world, told, split, self.seed, side, options.num_frames, jitter, size=self._size
            )
        self._picture_share = shares.get(PICTURES, 0.0) / sum(shares.values())
        self.forms = frozenset(ALL_FORM_OF.get(name, "image_text") for name in shares)

    @property
    def files(self) -> list[Path]:
        """The files that say what the samples are."""
        return [self.world.archive]

    def __len__(self) -> int:
        return self._size

    def shard(self, index: int) -> str:
        return self.world.archive.name

    def read(self, index: int) -> Sample:
        name = f"{self.name}/{index}"
        if self._told is None or unit("nano", self.seed, index) < self._picture_share:
            assert self._pictures is not None
            return image_text(name, *self._pictures[index])
        return replace(self._told[index], id=name)
