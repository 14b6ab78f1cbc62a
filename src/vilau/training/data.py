"""From the `data` part of a configuration to what the stages read: the nano world, or sources of one's own."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer

from vilau.data.feed import PairFeed, SampleFeed
from vilau.data.mixture import Entry, Mixture
from vilau.data.nano.dataset import ImageTextDataset, NanoDataset
from vilau.data.nano.world import ASSETS, World
from vilau.data.sources.nano import FORM_NAMES
from vilau.data.sources.source import ReadOptions, SourceConfig
from vilau.processing.augment import AugmentConfig
from vilau.processing.templates import ChatTemplate
from vilau.training import language_model
from vilau.training.config import (
    STAGE_ORDER,
    LanguageStageConfig,
    StageConfig,
    StageName,
    TowerStageConfig,
    TrainConfig,
)


def stage_seed(config: TrainConfig, name: StageName) -> int:
    """Return the seed of everything random in a stage: that of the run, and which of the run's stages it is."""
    return config.seed * 100 + [stage for stage in STAGE_ORDER if stage in config.stages].index(name)


def load_world(config: TrainConfig) -> World:
    """Return the nano world that a configuration names."""
    folder = Path(config.data.world) if config.data.world else None
    return World.load(folder, objects=config.data.objects, styles=tuple(config.data.styles))


def load_tokenizer(config: TrainConfig) -> Any:
    """Return the tokenizer of a configuration: `data.tokenizer`, else the nano world's.

    Another one gets what it lacks of a pad token and of the special tokens of `data.template`.

    Raises:
        ValueError: there is no such tokenizer.
    """
    if config.data.tokenizer is None:
        own = Path(config.data.world or ASSETS) / "tokenizer"  # `vilau data nano` writes none: it is the same for all
        return AutoTokenizer.from_pretrained(own if own.is_dir() else ASSETS / "tokenizer")
    try:
        return language_model.load_tokenizer(config.data.tokenizer, ChatTemplate.from_dict(config.data.template))
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from error


def build_pairs(config: TrainConfig, name: StageName, size: int, seed: int) -> ImageTextDataset | PairFeed:
    """Return pictures and captions for a stage of the vision tower, at `size` pixels.

    Raises:
        ValueError: a source that is not there, cannot be read at all or holds no pairs; too few samples.
    """
    settings = config.stages[name]
    if not config.data.sources:
        _refuse_mixture(settings.mixture, name)
        return ImageTextDataset(load_world(config), "train", seed, size, settings.num_steps * settings.batch_size)
    contrast = _contrasts(settings)
    feed = PairFeed(build_mixture(config, name, seed, size), size, config.data.augment, seed, contrast)
    feed.probe()
    return feed


def build_nano_samples(config: TrainConfig, name: StageName, size: int, num_frames: int) -> NanoDataset:
    """Return the nano world's samples for a language stage, at `size` pixels; endless until its steps are known."""
    settings = config.stages[name]
    assert isinstance(settings, LanguageStageConfig)
    count = sys.maxsize if settings.steps is None else settings.steps * settings.batch_size
    seed = stage_seed(config, name)
    return NanoDataset(load_world(config), settings.mixture, "train", seed, size, num_frames, settings.jitter, count)


def build_samples(
    config: TrainConfig,
    name: StageName,
    size: int,
    num_frames: int,
    swap: Callable[[list[Entry]], list[Entry]] = lambda entries: entries,
) -> SampleFeed:
    """Return samples of one's own sources for a language stage, at `size` pixels.

    swap: may put other sources of the same names and lengths in their place.

    Raises:
        ValueError: a source that is not there or cannot be read at all; too few samples.
    """
    feed = SampleFeed(build_mixture(config, name, stage_seed(config, name), size, num_frames, swap), size)
    feed.probe()
    return feed


def build_mixture(
    config: TrainConfig,
    name: StageName,
    seed: int,
    size: int,
    num_frames: int = 8,
    swap: Callable[[list[Entry]], list[Entry]] = lambda entries: entries,
) -> Mixture:
    """Return the mixture of a stage: the sources that its `mixture` names, or all of them by their own weights.

    size: side S of the model's square, for sources that draw their pictures.
    swap: may put other sources of the same names and lengths in their place.

    Raises:
        ValueError: a name that no source has, a weight that is not above 0, or fewer samples than the stage reads,
            where its steps are known.
    """
    settings = config.stages[name]
    mixture = Mixture(swap(_open_for(config, name, size, num_frames)), seed)
    wanted = (settings.steps or 0) * settings.batch_size
    if mixture.total is not None and mixture.total < wanted:
        raise ValueError(
            f"stages.{name} reads {settings.steps} steps x {settings.batch_size} = {wanted} samples, but its sources "
            f"give {mixture.total} with the `epochs` they have: raise these, or train fewer steps"
        )
    return mixture


def count_samples(config: TrainConfig, name: StageName, size: int, num_frames: int = 8) -> int:
    """Return how many samples all sources of a stage hold together, each counted once: an epoch.

    Raises:
        ValueError: a source that is not there.
    """
    return sum(len(entry.source) for entry in _open_for(config, name, size, num_frames))


def _open_for(config: TrainConfig, name: StageName, size: int, num_frames: int) -> list[Entry]:
    settings, where = config.stages[name], f"stages.{name}.mixture"
    return open_sources(config, size, num_frames, settings.mixture, where, needs_captions=_contrasts(settings))


def _contrasts(settings: StageConfig) -> bool:
    return not isinstance(settings, TowerStageConfig) or settings.contrastive_weight > 0


def validation_pairs(config: TrainConfig, size: int) -> list[tuple[np.ndarray, str]]:
    """Return pictures ``(size, size, 3)`` uint8 and captions of `data.validation`, `validation_samples` at most.

    Samples that cannot be used give way to others, as in training; nothing is augmented. Captions may be missing where
    no stage learns from them.

    Raises:
        ValueError: a source that is not there, cannot be read at all or holds no pairs.
    """
    contrast = any(map(_contrasts, config.stages.values()))  # type: ignore[arg-type]
    options = _read_options(config, size, 8, contrast, held_out=True)
    entries = [Entry(source.open(options), "size", 1.0) for source in config.data.validation]
    plain = AugmentConfig(resize=config.data.augment.resize)
    feed = PairFeed(Mixture(entries, seed=0), size, plain, seed=0, needs_captions=contrast)
    feed.probe()
    assert feed.mixture.total is not None
    return [feed[number] for number in range(min(config.validation_samples, feed.mixture.total))]


def _read_options(
    config: TrainConfig, size: int, num_frames: int, needs_captions: bool, held_out: bool = False
) -> ReadOptions:
    settings = config.data
    return ReadOptions(
        num_frames,
        settings.max_pixels,
        cache=Path(settings.cache) if settings.cache else None,
        needs_captions=needs_captions,
        image_size=size,
        held_out=held_out,
    )


def open_sources(
    config: TrainConfig,
    size: int,
    num_frames: int,
    weights: Mapping[str, float] | None = None,
    where: str = "mixture",
    needs_captions: bool = True,
) -> list[Entry]:
    """Open the sources of a configuration, those of `weights` only where it names some."""
    settings, options = config.data, _read_options(config, size, num_frames, needs_captions)
    sources: dict[str, SourceConfig] = {}
    for source in settings.sources:
        if source.label in sources:
            raise ValueError(f"data.sources: two sources have the name {source.label!r}; give one another `name`")
        sources[source.label] = source
    for label in weights or {}:
        if label not in sources:
            near = difflib.get_close_matches(label, sources, 1, 0.0)[0]
            hint = "; forms of the nano world are the `forms` of a source of format nano" if label in FORM_NAMES else ""
            raise ValueError(f"{where}: no source has the name {label!r}; did you mean {near!r}?{hint}")
    chosen: dict[str, float | Literal["size"]] = {label: source.weight for label, source in sources.items()}
    if weights:
        chosen = dict(weights)
    for label, weight in chosen.items():
        if weight != "size" and not 0 < weight < float("inf"):
            raise ValueError(f"source {label!r} has weight {weight}, but it must be above 0: leave the source out")
    return [
        Entry(sources[label].open(options), weight, sources[label].epochs, sources[label].ways_round)
        for label, weight in chosen.items()
    ]


def _refuse_mixture(mixture: Mapping[str, float], name: StageName) -> None:
    if mixture:
        raise ValueError(
            f"stages.{name}.mixture names sources, but there are none under data.sources; the nano world's pictures "
            "have no mixture"
        )
