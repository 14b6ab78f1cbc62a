"""From a configuration to finished stages: build the data, the model and the engine of each, in order."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vilau.data.feed import SampleFeed
from vilau.data.sample import Sample
from vilau.processing.encode import EncodedSample
from vilau.training import parallel
from vilau.training.config import (
    STAGE_ORDER,
    LanguageStageConfig,
    StageConfig,
    StageName,
    TowerStageConfig,
    TrainConfig,
)
from vilau.training.data import build_pairs, count_samples, load_tokenizer, stage_seed
from vilau.training.engine import Engine, EngineOptions, SampleHook, ValidationHook, is_finished
from vilau.training.language import LanguageStage, encode_for_stage, read_encoded
from vilau.training.language_init import StartingModel, starting_folder, starting_model
from vilau.training.length import Length, kept_steps, settle_length, steps_of_epochs, steps_of_tokens
from vilau.training.model_config import build_config
from vilau.training.precompute import build_stage_samples
from vilau.training.stage import Stage
from vilau.training.stopping import StopSignal, check_marker
from vilau.training.tower_init import starting_tower
from vilau.training.vision_tower import TowerStage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the caller adds: `samples` draws pictures at intervals, `on_step` is called after each step.

    `validation` returns figures on data that training never shows; they are logged and change nothing.
    """

    samples: SampleHook | None = None
    validation: ValidationHook | None = None
    on_step: Callable[[str, int], None] | None = None


def run(config: TrainConfig, hooks: Hooks = Hooks(), show_progress: bool = True) -> Path:
    """Train all stages of `config` and return the folder of the last one's result; finished stages are skipped.

    Raises:
        StopRequested: SIGTERM or SIGINT arrived; calling this again goes on from there.
        TrainingError: training cannot go on.
    """
    names = [name for name in STAGE_ORDER if name in config.stages]
    if not names:
        raise ValueError("the configuration has no stages: add at least one under `stages`")
    build_config(config, load_tokenizer(config))  # a wrong key fails before anything is trained
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    result: Path | None = None
    check_marker([output / name for name in names], os.environ.get("RANK", "0") == "0")  # before any needs the others
    with StopSignal() as stop:
        parallel.start()
        try:
            for name in names:
                if is_finished(output / name):
                    result = output / name / "final"
                    _say_finished(name, result, config.stages[name])
                    continue
                torch.manual_seed(config.seed)
                seed = stage_seed(config, name)
                stage = build_stage(config, name, result)
                options = EngineOptions(
                    output / name,
                    seed,
                    config.log_every,
                    config.save_every,
                    config.sample_every,
                    config.keep_checkpoints,
                    config.data.workers,
                    hooks.samples,
                    _bind(hooks.on_step, name),
                    show_progress,
                    config.validate_every,
                    hooks.validation,
                    scale=config.stages[name].scale or config.scale,
                    skip_spikes=config.skip_spikes,
                    loggers=config.loggers,
                    max_skipped_share=config.data.max_skipped_share,
                )
                engine = Engine(stage, options, stop)
                result = engine.run()
                if engine.stopped and name != names[-1]:
                    raise engine.stop_error()
        finally:
            parallel.stop()
    assert result is not None
    return result


def _say_finished(name: StageName, result: Path, settings: StageConfig) -> None:
    """Say that a stage is left as it is, and so if the configuration now asks for more or fewer steps."""
    wanted = settings.steps if settings.steps is not None else kept_steps(result.parent, settings)
    taken = json.loads((result / "training.json").read_text(encoding="utf-8")).get("steps", wanted)
    if taken == wanted:
        logger.info("%s is finished already", name)
        return
    logger.warning(
        "%s is finished already, with %d steps: %s have no effect; train into another output folder, or remove "
        "%s to go on from its last checkpoint",
        name,
        taken,
        settings.length,
        result,
    )


def build_stage(config: TrainConfig, name: StageName, previous: Path | None) -> Stage:
    """Return a stage ready to train, its weights from `init_from`, else from the previous stage, else fresh."""
    settings = config.stages[name]
    try:
        source_folder = starting_folder(settings.init_from) if settings.init_from else previous
    except ValueError as error:
        raise ValueError(f"stages.{name}.init_from: {error}") from error
    if isinstance(settings, TowerStageConfig):
        return _tower_stage(config, name, settings, source_folder)
    return _language_stage(config, name, settings, source_folder)


def _tower_stage(config: TrainConfig, name: StageName, settings: TowerStageConfig, folder: Path | None) -> TowerStage:
    seed = stage_seed(config, name)
    start = starting_tower(config, settings, folder, load_tokenizer(config))
    tower = start.tower
    if settings.perceptual == "siglip" and not start.sees:
        logger.warning(
            "%s: perceptual 'siglip' compares features of the initial image encoder, which is untrained here: a random "
            "network's distances, little more than pixels; use 'lpips' or 'none' to start from scratch",
            name,
        )
    size = int(tower.config.image_size)
    config = settle_length(config, name, lambda: steps_of_epochs(settings, count_samples(config, name, size)))
    settled = config.stages[name]
    assert isinstance(settled, TowerStageConfig)
    pictures = build_pairs(config, name, size, seed)
    text = tower.config.text_encoder_config
    length = text.max_position_embeddings if text is not None else 1
    return TowerStage(name, settled, tower, pictures, start.tokenizer, length, seed)


def _language_stage(
    config: TrainConfig, name: StageName, settings: LanguageStageConfig, folder: Path | None
) -> LanguageStage:
    start = starting_model(config, settings, folder)
    config = settle_length(config, name, lambda: _language_length(config, name, settings, start))
    settled = config.stages[name]
    assert isinstance(settled, LanguageStageConfig)
    samples = build_stage_samples(config, name, start.model)
    return LanguageStage(name, settled, start.model, samples, start.processor, stage_seed(config, name))


def _language_length(
    config: TrainConfig, name: StageName, settings: LanguageStageConfig, start: StartingModel
) -> Length:
    """Work out the steps of a language stage from its epochs, or from its tokens by measuring some of its samples."""
    vision, seed = start.model.config.vision_config, stage_seed(config, name)
    if settings.epochs is not None:
        size = int(start.model.vision_tower.config.image_size)
        return steps_of_epochs(settings, count_samples(config, name, size, int(start.model.config.num_frames)))
    samples = build_stage_samples(config, name, start.model)

    def encode(sample: Sample) -> EncodedSample:
        return encode_for_stage(sample, settings, start.processor, vision.num_positions, seed)

    total = samples.mixture.total if isinstance(samples, SampleFeed) else None
    return steps_of_tokens(
        settings, lambda number: len(read_encoded(samples, number, encode)), total, settings.row_length, seed
    )


def _bind(on_step: Callable[[str, int], None] | None, name: str) -> Callable[[int], None] | None:
    return None if on_step is None else lambda step: on_step(name, step)
