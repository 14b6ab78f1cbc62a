"""The batches of every step, made ahead by loader processes: the order is the same for any number of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vilau.data.mixture import SkipCounts
from vilau.training import parallel
from vilau.training.stage import Stage


def step_batches(stage: Stage, first: int, parts: int, workers: int) -> Iterator[tuple[list[Any], SkipCounts]]:
    """Yield this process's micro-batches of each step, and what was skipped while they were made.

    Args:
        stage: makes them.
        first: 0-based step to begin with.
        parts: micro-batches per step.
        workers: loader processes; 0 makes the batches here.
    """
    loader = DataLoader(
        _StepBatches(stage, parallel.rank(), parallel.world_size(), parts),
        batch_size=None,
        sampler=range(first, stage.config.num_steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=_unchanged,  # the default copies counters by adding them to themselves
        worker_init_fn=_quiet_worker,
    )
    return iter(loader)


class _StepBatches(Dataset):
    """Item n is this process's micro-batches of step n, with the counts of samples that were skipped."""

    def __init__(self, stage: Stage, rank: int, world_size: int, parts: int) -> None:
        self.stage, self.rank, self.world_size, self.parts = stage, rank, world_size, parts

    def __len__(self) -> int:
        return self.stage.config.num_steps

    def __getitem__(self, step: int) -> tuple[list[Any], SkipCounts]:
        first, all_parts = self.rank * self.parts, self.world_size * self.parts
        batches = [self.stage.make_batch(step, first + part, all_parts) for part in range(self.parts)]
        return batches, self.stage.take_skips()


def _unchanged(item: Any) -> Any:
    return item


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the whole group is the engine's to handle
