"""A stage so small that an engine's whole life takes milliseconds, and what tests of towers and language share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from vilau.data.nano.world import ASSETS
from vilau.training.config import OptimizerConfig, StageConfig
from vilau.training.engine import Engine, EngineOptions
from vilau.training.stage import Stage, StepResult
from vilau.training.stopping import StopSignal
from vilau.training.vision_tower import local_numbers


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(ASSETS / "tokenizer")


@pytest.fixture(scope="session")
def caption_encoder(tokenizer: Any) -> dict[str, Any]:
    """Fields of a small text encoder; add `max_position_embeddings`."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_size": 32,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }


class TinyStage(Stage):
    """A linear map that learns to undo itself; a batch is a row of sample numbers."""

    def __init__(self, steps: int = 8, batch_size: int = 4, width: int = 3) -> None:
        torch.manual_seed(0)
        self.name = "tiny"
        self.config = StageConfig(steps=steps, batch_size=batch_size, optimizer=OptimizerConfig(warmup_steps=2))
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.seen: list[list[int]] = []
        self.poison: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def make_batch(self, step: int, rank: int, world_size: int) -> torch.Tensor:
        return torch.tensor(list(local_numbers(step, self.config.batch_size, rank, world_size)))

    def train_mode(self) -> None:
        self.module.train()

    def compute(self, batch: torch.Tensor, step: int) -> StepResult:
        self.seen.append(batch.tolist())
        width = self.module[0].in_features
        x = torch.sin(batch.float().unsqueeze(1) * torch.arange(1, width + 1))
        noisy = x + 0.1 * torch.randn_like(x)
        loss = (self.module(noisy) - x).square().mean()
        loss = self.poison.get(step, lambda same: same)(loss)
        return StepResult(loss, {"loss": (loss.detach(), 1)})

    def save_result(self, folder: Path) -> None:
        torch.save(self.module.state_dict(), folder / "weights.pt")


@pytest.fixture
def tiny_stage() -> type[TinyStage]:
    """The class, to be built with `steps`, `batch_size`, `width`."""
    return TinyStage


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    """Build an engine over a new `TinyStage` in one folder per test."""

    def build(stage: TinyStage | None = None, stop: StopSignal | None = None, **options: Any) -> Engine:
        settings: dict[str, Any] = {
            "folder": tmp_path / "tiny",
            "seed": 1,
            "log_every": 1,
            "save_every": 2,
            "sample_every": 100,
            "keep_checkpoints": 2,
            "show_progress": False,
        }
        return Engine(stage or TinyStage(), EngineOptions(**(settings | options)), stop or StopSignal())

    return build
