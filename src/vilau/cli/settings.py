"""Training configurations for commands: read before anything heavy is loaded, so that a slip costs no time."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.training.config import TrainConfig, load_config


def read_settings(config: Path, overrides: list[str]) -> TrainConfig:
    """Read a configuration; what is wrong with the changes to it is wrong usage, and not the file's fault."""
    try:
        return load_config(config, overrides)
    except ValueError as error:
        if overrides and _is_valid(config):
            raise typer.BadParameter(str(error).removeprefix(f"{config}: ")) from error
        raise


def _is_valid(config: Path) -> bool:
    try:
        load_config(config)
    except ValueError:
        return False
    return True
