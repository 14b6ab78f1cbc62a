"""What a run shows of itself at intervals: a tower's reconstructions; a model's drawings, films, captions, answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from vilau.configuration import VilaUConfig
from vilau.data.feed import SampleFeed
from vilau.data.nano.scenes import contact_sheet, render, single
from vilau.data.sample import Sample, Turn, holds_codes
from vilau.evaluation.tower_pictures import reconstruction_rows
from vilau.files import write_json
from vilau.modeling.vila_u import VilaUModel
from vilau.pipeline import Pipeline
from vilau.processing.images import load_image, resize_square, to_pixels
from vilau.training.config import SamplesConfig, TrainConfig
from vilau.training.data import load_world
from vilau.training.language import LanguageStage
from vilau.training.stage import Stage
from vilau.training.vision_tower import TowerStage, to_pixel_values

NANO = SamplesConfig(
    prompts=[
        "a red apple on a blue background",
        "a dog on a green background",
        "a panda on a purple background",
        "a rocket on a yellow background",
        "three bananas on a white background",
        "a cat left of a car on an orange background",
    ],
    films=["a car moving right on a white background", "a frog growing on a blue background"],
    questions=["what is this?", "what colour is the background?"],
)
NANO_PICTURES = (("dog", "green"), ("car", "white"), ("banana", "blue"), ("pizza", "red"))
ROW, SIDE = 8, 128  # pictures in a row of the sheet; pixels that one is enlarged to
LOOKED_AT = 64  # samples of one's own among which prompts, questions and pictures are found
PICTURES, FILMS, QUESTIONS = 4, 2, 2  # found there; of prompts a row
LONGEST = 300  # characters of a question that is asked about other pictures too
MAX_NEW_TOKENS = 48


@dataclass
class Sheet:
    """Pictures ``(S, S, 3)`` uint8 with what stands below each, and the texts alone for reading."""

    pictures: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)

    def add(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> None:
        """Add a row."""
        self.pictures += [np.asarray(picture) for picture in pictures]
        self.names += names

    def save(self, folder: Path, step: int) -> None:
        """Write ``step-NNNNNNN.png`` and, where there are texts, ``.json`` beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        scale = max(1, SIDE // max(picture.shape[1] for picture in self.pictures))
        file = folder / f"step-{step:07d}.png"
        contact_sheet(self.pictures, self.names, columns=ROW, scale=scale).save(file)
        if self.texts:
            write_json(self.texts, file.with_suffix(".json"))


@dataclass
class Found:
    """What the first samples of a stage's data have to draw, to ask and to look at, each text once; frames are pixels
    ``(S, S, 3)`` uint8 or codes ``(P, D)``."""

    prompts: dict[str, None] = field(default_factory=dict)
    films: dict[str, None] = field(default_factory=dict)
    questions: dict[str, None] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Take of a sample what is still wanted."""
        asked = [_words(turn) for turn in sample.turns if turn.role == "user"]
        if sample.form == "text_image":
            _add_text(self.prompts, " ".join(filter(None, asked)), ROW)
        elif sample.form == "text_video":
            _add_text(self.films, " ".join(filter(None, asked)), FILMS)
        elif sample.form in ("image_text", "question"):
            question = next(filter(None, asked), "")
            _add_text(self.questions, question if len(question) <= LONGEST else "", QUESTIONS)
        if sample.frames and len(self.frames) < PICTURES:
            self.frames.append(sample.frames[0])


class Sampler:
    """The hook that the engine calls. What is drawn and asked stands under `samples` in the configuration; where it
    says nothing, the nano world's own prompts are used, or texts and pictures out of the data."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._looked: tuple[LanguageStage, Found] | None = None

    def __call__(self, stage: Stage, step: int, folder: Path) -> None:
        sheet = Sheet()
        if isinstance(stage, TowerStage):
            if stage.reconstruct:
                pixels = torch.from_numpy(np.stack([stage.source[number][0] for number in range(ROW)]))
                sheet.add(*_reconstructions(stage, pixels))
        elif isinstance(stage, LanguageStage):
            self._speak_and_draw(stage, sheet)
        if sheet.pictures:
            sheet.save(folder, step)

    def _speak_and_draw(self, stage: LanguageStage, sheet: Sheet) -> None:
        wanted = self._wanted(stage)
        model = Pipeline(_whole(stage.model), stage.processor)
        draws = stage.model.vision_tower.quantizer.discrete
        if draws and wanted.prompts:
            drawn = model.draw(wanted.prompts, seed=[1] * len(wanted.prompts))
            sheet.add([np.asarray(picture) for picture in drawn], wanted.prompts)
        if draws and wanted.films:
            for prompt, film in zip(wanted.films, model.film(wanted.films, seed=[1] * len(wanted.films)), strict=True):
                sheet.add([np.asarray(frame) for frame in film], [prompt] * len(film))
        for number, picture in enumerate(self._pictures(stage)):
            said = {"caption": model.ask(picture, max_new_tokens=MAX_NEW_TOKENS)}
            for question in wanted.questions:
                said[question] = model.ask(picture, question, max_new_tokens=MAX_NEW_TOKENS)
            sheet.add([np.asarray(picture)], [" / ".join(said.values())])
            sheet.texts[f"picture {number + 1}"] = said

    def _wanted(self, stage: LanguageStage) -> SamplesConfig:
        if self.config.samples != SamplesConfig():
            return self.config.samples
        if not self.config.data.sources:
            return NANO
        found = self._found(stage)
        return SamplesConfig(prompts=list(found.prompts), films=list(found.films), questions=list(found.questions))

    def _found(self, stage: LanguageStage) -> Found:
        """Look at the data once per stage."""
        if self._looked is None or self._looked[0] is not stage:
            found = Found()
            for sample in _first_samples(stage):
                found.add(sample)
            self._looked = stage, found
        return self._looked[1]

    def _pictures(self, stage: LanguageStage) -> list[Image.Image]:
        """Pictures to describe, of the model's size."""
        size = int(stage.model.config.vision_config.image_size)
        if self.config.samples.pictures:
            return [resize_square(load_image(path), size) for path in self.config.samples.pictures]
        if not self.config.data.sources:
            world = load_world(self.config)
            known = {thing.name for thing in world.objects}
            scenes = (single(name, colour, world.styles[0]) for name, colour in NANO_PICTURES if name in known)
            return [Image.fromarray(render(scene, world, size)) for scene in scenes]
        return [Image.fromarray(_pixels(stage, frame)) for frame in self._found(stage).frames]


def _first_samples(stage: LanguageStage) -> Iterator[Sample]:
    """Yield what the stage reads first, without counting bad samples as met by the run."""
    source: Any = stage.source
    count = LOOKED_AT
    if isinstance(source, SampleFeed):
        source = SampleFeed(copy.copy(source.mixture), source.size)
        source.take_skips()  # the copy counts for itself from here on
        count = min(count, source.mixture.total or count)
    return (source[number] for number in range(count))


def _pixels(stage: LanguageStage, frame: np.ndarray) -> np.ndarray:
    """A frame's pixels ``(S, S, 3)`` uint8; of codes, what the tower makes of them."""
    if not holds_codes(frame):
        return frame
    tower = stage.model.vision_tower
    drawn = tower.decode(torch.from_numpy(frame.astype(np.int64)).unsqueeze(0).to(tower.device))
    return to_pixels(drawn.float().cpu().numpy())[0]


def _words(turn: Turn) -> str:
    return " ".join(part.text for part in turn.parts if part.text)


def _add_text(texts: dict[str, None], text: str, limit: int) -> None:
    if text and len(texts) < limit:
        texts[text] = None


def _reconstructions(stage: TowerStage, frames: torch.Tensor) -> tuple[list[np.ndarray], list[str]]:
    """Originals, then decodings of the first 1, 2 ... D code vectors: a row of pictures each."""
    rows = reconstruction_rows(stage.tower, to_pixel_values(frames).to(stage.tower.device))
    names = ["original", *(f"depth {depth}" for depth in range(1, len(rows)))]
    pixels = to_pixels(torch.cat(rows).float().cpu().numpy())
    return list(pixels), [name for name in names for _ in range(len(frames))]


def _whole(model: VilaUModel) -> Any:
    """The same parts as a model that generates; no weight is copied."""
    from vilau.model import VilaUForConditionalGeneration

    with torch.device("meta"):
        whole: Any = VilaUForConditionalGeneration(cast(VilaUConfig, model.config))
    for name, part in model.named_children():
        setattr(whole, name, part)
    return whole
