"""From a configuration to finished stages: build the data, the model and the engine of each, in order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vilau.configuration import VilaUConfig
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.processor import build_processor
from vilau.training import parallel
from vilau.training.config import STAGE_ORDER, LanguageStageConfig, StageName, TowerStageConfig, TrainConfig
from vilau.training.data import build_pairs, build_samples, load_tokenizer
from vilau.training.data import load_world as load_world
from vilau.training.engine import Engine, EngineOptions, SampleHook, ValidationHook, is_finished
from vilau.training.language import LanguageStage
from vilau.training.model_config import build_config
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
            for number, name in enumerate(names):
                if is_finished(output / name):
                    logger.info("%s is finished already", name)
                    result = output / name / "final"
                    continue
                torch.manual_seed(config.seed)
                seed = config.seed * 100 + number
                stage = build_stage(config, name, result, seed)
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
                )
                engine = Engine(stage, options, stop)
                result = engine.run()
                if engine.stopped and name != names[-1]:
                    raise engine.stop_error()
        finally:
            parallel.stop()
    assert result is not None
    return result


def build_stage(config: TrainConfig, name: StageName, previous: Path | None, seed: int) -> Stage:
    """Return a stage ready to train, its weights from `init_from`, else from the previous stage, else fresh."""
    settings = config.stages[name]
    source_folder = Path(settings.init_from) if settings.init_from else previous
    if source_folder is not None and not source_folder.is_dir():
        raise ValueError(f"stages.{name}.init_from: there is no folder {source_folder}")
    if isinstance(settings, TowerStageConfig):
        return _tower_stage(config, name, settings, source_folder, seed)
    return _language_stage(config, name, settings, source_folder, seed)


def _tower_stage(
    config: TrainConfig, name: StageName, settings: TowerStageConfig, folder: Path | None, seed: int
) -> TowerStage:
    start = starting_tower(config, settings, folder, load_tokenizer(config))
    tower = start.tower
    if settings.perceptual == "siglip" and not start.sees:
        logger.warning(
            "%s: perceptual 'siglip' compares features of the initial image encoder, which is untrained here: a random "
            "network's distances, little more than pixels; use 'lpips' or 'none' to start from scratch",
            name,
        )
    pictures = build_pairs(config, name, tower.config.image_size, seed)
    text = tower.config.text_encoder_config
    length = text.max_position_embeddings if text is not None else 1
    return TowerStage(name, settings, tower, pictures, start.tokenizer, length, seed)


def _language_stage(
    config: TrainConfig, name: StageName, settings: LanguageStageConfig, folder: Path | None, seed: int
) -> LanguageStage:
    tokenizer = load_tokenizer(config)
    model_config = build_config(config, tokenizer)
    model = load_language_stage(model_config, folder)
    samples = build_samples(config, name, model_config, seed)
    return LanguageStage(name, settings, model, samples, build_processor(tokenizer, model.config), seed)


def load_language_stage(model_config: VilaUConfig, folder: Path | None) -> VilaUModel:
    """Return the joined model: from a finished language stage, or fresh around a finished (or fresh) tower."""
    if folder is not None and _holds_joined_model(folder):
        return VilaUModel.from_pretrained(folder)
    model = VilaUModel(model_config)
    if folder is not None:
        tower = VisionTower.from_pretrained(folder)
        tower.text_encoder = None
        model.vision_tower.load_state_dict(tower.state_dict())
    return model


def _holds_joined_model(folder: Path) -> bool:
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(os.fspath(folder))[0].get("model_type") == VilaUConfig.model_type


def _bind(on_step: Callable[[str, int], None] | None, name: str) -> Callable[[int], None] | None:
    return None if on_step is None else lambda step: on_step(name, step)
