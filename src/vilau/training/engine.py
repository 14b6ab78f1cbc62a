"""The loop: any stage, any number of processes, exact resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vilau.training import parallel
from vilau.training.checkpoint import (
    load_checkpoint,
    newest_intact,
    publish,
    save_checkpoint,
    seal,
    state_digest,
)
from vilau.training.metrics import MetricLog
from vilau.training.optimizers import build_optimizers, lr_share, set_lr
from vilau.training.stage import Stage

logger = logging.getLogger(__name__)

SampleHook = Callable[[Stage, int, Path], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class StopRequested(Exception):
    """A signal asked for an end; a complete checkpoint was written first. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class EngineOptions:
    """How a run is kept: `folder` of the stage, intervals in steps, seed, loader processes, hooks."""

    folder: Path
    seed: int
    log_every: int
    save_every: int
    sample_every: int
    keep_checkpoints: int
    workers: int = 0
    sample_hook: SampleHook | None = None
    on_step: Callable[[int], None] | None = None
    show_progress: bool = True


class _StepBatches(Dataset):
    """Item n is this process's part of the batch of step n, so the order is the same for any number of workers."""

    def __init__(self, stage: Stage, rank: int, world_size: int) -> None:
        self.stage, self.rank, self.world_size = stage, rank, world_size

    def __len__(self) -> int:
        return self.stage.config.steps

    def __getitem__(self, step: int) -> Any:
        return self.stage.make_batch(step, self.rank, self.world_size)


@dataclass
class Engine:
    """Run one stage to its end, from the newest intact checkpoint if there is one."""

    stage: Stage
    options: EngineOptions
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    step: int = field(init=False, default=0)
    _stop: int = field(init=False, default=0)

    @property
    def result(self) -> Path:
        """Folder of the finished stage."""
        return self.options.folder / "final"

    def run(self) -> Path:
        """Train until the configured step and return the folder with the result; a finished stage returns at once.

        Raises:
            TrainingError: a loss is not finite on any process (all stop before the update).
            StopRequested: SIGTERM or SIGINT arrived; everything up to this step is in a checkpoint.
        """
        if self.result.is_dir():
            return self.result
        self.optimizers = build_optimizers(self.stage.module, self.stage.config.optimizer)
        self._resume()
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._finish()
        return self.result

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = number

    def _resume(self) -> None:
        path = newest_intact(self.options.folder / "checkpoints")
        if path is not None:
            self.step = int(load_checkpoint(path, self.stage.module, self.optimizers)["step"])
            logger.info("%s: resuming after step %d", self.stage.name, self.step)

    def _batches(self) -> Iterator[Any]:
        data = _StepBatches(self.stage, parallel.rank(), parallel.world_size())
        workers = self.options.workers
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, self.stage.config.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_quiet_worker,
        )
        return iter(loader)

    def _loop(self) -> None:
        total, options = self.stage.config.steps, self.options
        log = MetricLog(options.folder, self.stage.name, total, self.step, options.show_progress)
        with log:
            for batch in self._batches():
                started = time.perf_counter()
                sums = self._train_step(batch)
                self.step += 1
                log.add(sums, self.stage.config.batch_size, time.perf_counter() - started)
                if options.on_step is not None:
                    options.on_step(self.step)
                if self.step % options.log_every == 0 or self.step == total:
                    log.report(self.step, self.optimizers[0].param_groups[0]["lr"])
                stop = parallel.any_rank(self._stop > 0)
                if stop or self.step % options.save_every == 0 or self.step == total:
                    self._save()
                if self.step % options.sample_every == 0 or self.step == total:
                    self._draw_samples()
                if stop and self.step < total:
                    self._mark_stop()
                    number = self._stop or signal.SIGTERM  # the signal may have reached another process only
                    raise StopRequested(
                        f"{self.stage.name} stopped on request after step {self.step}", 128 + int(number)
                    )

    def _train_step(self, batch: Any) -> dict[str, tuple[float, float]]:
        config = self.stage.config
        torch.manual_seed(step_seed(self.options.seed, self.step, parallel.rank()))
        self.stage.train_mode()
        set_lr(self.optimizers, lr_share(self.step, config.steps, config.optimizer))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        result = self.stage.compute(batch, self.step)
        loss = float(result.loss.detach())
        if parallel.any_rank(not math.isfinite(loss)):
            raise TrainingError(
                f"{self.stage.name}: the loss of step {self.step + 1} is not finite (here {loss}); the weights are as "
                "the last checkpoint has them - lower the learning rate or look at the batch"
            )
        result.loss.backward()
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        parallel.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        sums = _reduce(result.sums)
        sums["grad_norm"] = (float(norm), 1.0)
        return sums

    def _save(self) -> None:
        if parallel.rank() == 0:
            save_checkpoint(
                self.options.folder / "checkpoints",
                self.step,
                self.stage.module,
                self.optimizers,
                {"stage": self.stage.name, "seed": self.options.seed},
                self.options.keep_checkpoints,
            )
        parallel.barrier()

    def _draw_samples(self) -> None:
        if self.options.sample_hook is not None and parallel.rank() == 0:
            self.stage.module.eval()
            with torch.no_grad():
                self.options.sample_hook(self.stage, self.step, self.options.folder / "samples")
        parallel.barrier()

    def _mark_stop(self) -> None:
        if parallel.rank() == 0:
            (self.options.folder / "STOPPED").write_text(f"stopped on request after step {self.step}\n")

    def _finish(self) -> None:
        if parallel.rank() == 0:
            beside = self.options.folder / ".final.partial"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            self.stage.module.eval()
            self.stage.save_result(beside)
            facts = {
                "stage": self.stage.name,
                "steps": self.step,
                "digest": state_digest(self.stage.module, self.optimizers),
            }
            (beside / "training.json").write_text(json.dumps(facts, indent=1))
            seal(beside)
            publish(beside, self.result)
            (self.options.folder / "STOPPED").unlink(missing_ok=True)
        parallel.barrier()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers: nothing random outlives a step, so nothing needs to be stored."""
    return (seed * 1_000_003 + step * 65_537 + rank) % (1 << 62)


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the whole group is the engine's to handle


def _reduce(sums: Any) -> dict[str, tuple[float, float]]:
    names = sorted(sums)
    flat = torch.tensor([[float(torch.as_tensor(value).detach()) for value in sums[name]] for name in names], dtype=torch.float64)
    if parallel.world_size() > 1:  # another process may have figures that this one has not
        gathered: list[Any] = [None] * parallel.world_size()
        torch.distributed.all_gather_object(gathered, dict(zip(names, flat.tolist(), strict=True)))
        merged: dict[str, tuple[float, float]] = {}
        for part in gathered:
            for name, (total, count) in part.items():
                before = merged.get(name, (0.0, 0.0))
                merged[name] = (before[0] + total, before[1] + count)
        return merged
    return {name: (row[0], row[1]) for name, row in zip(names, flat.tolist(), strict=True)}
