"""`vilau train`: wire data, model, engine and the pictures that show how a run is doing."""

from __future__ import annotations

import logging
import os
import sys

import typer

from vilau.cli.common import quiet_libraries, say
from vilau.cli.train_samples import Sampler
from vilau.evaluation.features import load_extractor
from vilau.evaluation.tower import ValidationSet
from vilau.evaluation.tower_data import nano_validation, pairs_validation
from vilau.evaluation.validation import TowerValidation
from vilau.training.config import TrainConfig
from vilau.training.data import load_world, validation_pairs
from vilau.training.engine import StopRequested, TrainingError
from vilau.training.run import Hooks, run


def train(settings: TrainConfig) -> None:
    """Train every stage of a configuration; print the folder of the last result on stdout."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    speaks = os.environ.get("RANK", "0") == "0"  # all processes of a run end alike: one line is enough
    try:
        result = run(settings, Hooks(Sampler(settings), tower_validation(settings)))
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
