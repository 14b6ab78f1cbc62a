"""What a training stage must define for the engine to run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilau.training.config import StageConfig


@dataclass(frozen=True)
class StepResult:
    """One batch's outcome on this process.

    `loss` is this process's share: the shares of all processes add up to the loss of the global batch. `sums` maps
    the name of a figure to (sum, count) on this process; the engine reports the ratio over all processes.
    """

    loss: torch.Tensor
    sums: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]


class Stage(ABC):
    """A stage owns a module, knows how to make batch `n` and its loss, and writes its result."""

    name: str
    config: StageConfig
    module: nn.Module

    @abstractmethod
    def make_batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return this process's part of the batch of a 0-based step: a pure function of its arguments."""

    @abstractmethod
    def compute(self, batch: Any, step: int) -> StepResult:
        """Return loss and figures of one batch."""

    @abstractmethod
    def train_mode(self) -> None:
        """Put the parts that learn into training mode and the frozen ones into evaluation mode."""

    @abstractmethod
    def save_result(self, folder: Path) -> None:
        """Write the trained model into an existing empty folder."""
