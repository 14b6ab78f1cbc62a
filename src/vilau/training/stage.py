"""What a training stage must define for the engine to run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilau.data.mixture import SkipCounts
from vilau.training.config import StageConfig
from vilau.training.optimizers import build_optimizers, lr_share, set_lr


@dataclass(frozen=True)
class StepResult:
    """One batch's outcome on this process.

    `loss` is this process's share: the shares of all processes add up to the loss of the global batch (with several
    micro-batches per step: of the micro-batch, unless the stage sets `counts_whole_step`). `sums` maps
    the name of a figure to (sum, count) on this process; the engine reports the ratio over all processes.
    """

    loss: torch.Tensor
    sums: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients are clipped together to `norm`; `name` marks the reported norm, "" the main one."""

    name: str
    parameters: Sequence[nn.Parameter]
    norm: float


class Stage(ABC):
    """A stage owns a module, knows how to make batch `n` and its loss, and writes its result.

    `module` is what is trained for its own sake. A stage with more state (a discriminator, averaged weights) shows all
    of it in `state_module`, which checkpoints and digests cover.
    """

    name: str
    config: StageConfig
    module: nn.Module
    counts_whole_step = False  # whether losses are divided by what `prepare` counted over all micro-batches of a step

    @property
    def state_module(self) -> nn.Module:
        """All weights and buffers that a resumed run needs."""
        return self.module

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers; called once, before a checkpoint is read and after the module was placed."""
        return build_optimizers(self.module, self.config.optimizer)

    def set_learning_rates(self, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Set the learning rates of a 0-based step."""
        set_lr(optimizers, lr_share(step, self.config.num_steps, self.config.optimizer))

    def clip_groups(self, optimizers: list[torch.optim.Optimizer]) -> list[ClipGroup]:
        """Return which gradients are clipped together; every parameter of the optimizers is in one group."""
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        return [ClipGroup("", parameters, self.config.optimizer.clip_norm)]

    def after_step(self, step: int) -> None:  # noqa: B027 - most stages have nothing to do here
        """Do what follows the update of a 0-based step, for instance move averaged weights."""

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Return a context in which `module` has the weights that are validated and exported, and can generate."""
        return nullcontext()

    def use_attention(self, name: str | None, device: torch.device, bf16: bool) -> None:  # noqa: B027
        """Let the language model, where there is one, train with another attention; called before it is placed.

        name: None for the one that it has, which is tried too where the model is of a family that anybody may name.

        Raises:
            ValueError: this machine or the model cannot, or packed samples would see each other.
        """

    def sharded_blocks(self) -> list[nn.Module]:
        """Return the blocks that FSDP2 shards one by one: every process must run each of them in every step."""
        return []

    def work(self, batch: Any) -> Mapping[str, float]:
        """Return what a micro-batch holds, for rates: any of `images`, `tokens`, and `flops` forward and backward."""
        return {}

    def prepare(self, batches: list[Any]) -> list[Any]:
        """Return a step's micro-batches of this process, ready for `compute`; may talk to the other processes.

        A stage whose losses are means over unevenly spread positions counts them here, over all micro-batches and
        processes, and hands the counts on with each.
        """
        return batches

    def take_skips(self) -> SkipCounts:
        """Return what was skipped while making batches in this process since the last call."""
        take = getattr(getattr(self, "source", None), "take_skips", None)
        return take() if take is not None else Counter()

    @abstractmethod
    def make_batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return one part of `world_size` of the batch of a 0-based step: a pure function of its arguments.

        The parts are equal runs of the batch's sample numbers. With `n` micro-batches per process the engine asks for
        `n` times as many parts as there are processes.
        """

    @abstractmethod
    def compute(self, batch: Any, step: int) -> StepResult:
        """Return loss and figures of one batch."""

    @abstractmethod
    def train_mode(self) -> None:
        """Put the parts that learn into training mode and the frozen ones into evaluation mode."""

    @abstractmethod
    def save_result(self, folder: Path) -> None:
        """Write the trained model into an existing empty folder."""
