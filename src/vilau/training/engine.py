"""The loop: any stage, any number of processes, exact resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vilau.training import parallel
from vilau.training.checkpoint import (
    find_fault,
    load_checkpoint,
    newest_intact,
    publish,
    save_checkpoint,
    seal,
    state_digest,
)
from vilau.training.metrics import MetricLog
from vilau.training.stage import Stage
from vilau.training.stopping import StopRequested, StopSignal, mark_stopped

logger = logging.getLogger(__name__)

SampleHook = Callable[[Stage, int, Path], None]
ValidationHook = Callable[[Stage, int, Path], Mapping[str, float]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


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
    validate_every: int = 0
    validation_hook: ValidationHook | None = None


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
    """Run one stage to its end, from the newest intact checkpoint if there is one.

    Resuming is exact, bit for bit, with the same configuration and number of processes; with another number of
    processes the samples are the same and the losses equal up to rounding. With another `batch_size`, `steps` or seed
    the run goes on from the same step, with a warning: step n then reads the samples and has the learning rate of
    step n of the new configuration, so some samples are skipped or come again.
    """

    stage: Stage
    options: EngineOptions
    stop: StopSignal = field(default_factory=StopSignal)
    stopped: bool = field(init=False, default=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    step: int = field(init=False, default=0)

    @property
    def result(self) -> Path:
        """Folder of the finished stage."""
        return self.options.folder / "final"

    def run(self) -> Path:
        """Train until the configured step and return the folder with the result; a finished stage returns at once.

        A stop that arrives with the last step does not keep the stage from being finished; `stopped` then tells of it.

        Raises:
            TrainingError: a loss or gradient is not finite on any process (all stop before the update), or a
                checkpoint cannot be written or does not fit.
            StopRequested: SIGTERM or SIGINT arrived; everything up to this step is in a checkpoint.
        """
        if is_finished(self.options.folder):
            return self.result
        self.optimizers = self.stage.build_optimizers()
        self._resume()
        self._loop()
        self._on_first(self._finish)
        return self.result

    def _facts(self) -> dict[str, Any]:
        config = self.stage.config
        return {
            "stage": self.stage.name,
            "seed": self.options.seed,
            "batch_size": config.batch_size,
            "steps": config.steps,
        }

    def _resume(self) -> None:
        path = newest_intact(self.options.folder / "checkpoints")
        if path is None:
            return
        try:
            state = load_checkpoint(path, self.stage.state_module, self.optimizers)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.step = int(state["step"])
        changed = {name: (state.get(name, new), new) for name, new in self._facts().items()}
        for name, (old, new) in changed.items():
            if old != new:
                logger.warning("%s: goes on with %s %s instead of %s", self.stage.name, name, new, old)
        logger.info("%s: resuming after step %d from %s", self.stage.name, self.step, path.name)

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
                self._validate(log, total)
                self.stopped = parallel.any_rank(self.stop.number > 0)
                if self.stopped or self.step % options.save_every == 0 or self.step == total:
                    self._on_first(self._save)
                if self.step % options.sample_every == 0 or self.step == total:
                    self._draw_samples()
                if self.stopped and self.step < total:
                    raise self.stop_error()

    def stop_error(self) -> StopRequested:
        """Leave the marker and return the error that ends a run which was asked to stop."""
        if parallel.rank() == 0:
            mark_stopped(self.options.folder, self.step)
        parallel.barrier()  # no process leaves before the marker is there, lest it be started again without one
        number = self.stop.number or signal.SIGTERM  # the signal may have reached another process only
        return StopRequested(f"{self.stage.name} stopped on request after step {self.step}", 128 + int(number))

    def _on_first(self, write: Callable[[], object]) -> None:
        """Let the first process write while the others wait; when it cannot, all stop with the reason."""
        error: OSError | None = None
        if parallel.rank() == 0:
            try:
                write()
            except OSError as caught:
                error = caught
        if parallel.any_rank(error is not None):
            raise TrainingError(
                f"{self.stage.name}: {error or 'the first process could not write'}; earlier checkpoints are as they "
                "were, and the same command goes on from the newest"
            ) from error

    def _train_step(self, batch: Any) -> dict[str, tuple[float, float]]:
        torch.manual_seed(step_seed(self.options.seed, self.step, parallel.rank()))
        self.stage.train_mode()
        self.stage.set_learning_rates(self.optimizers, self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        result = self.stage.compute(batch, self.step)
        loss = float(result.loss.detach())
        where = parallel.ranks_where(not math.isfinite(loss))
        if where:
            raise self._not_finite("loss", f" on process {', '.join(map(str, where))}")
        result.loss.backward()
        groups = self.stage.clip_groups(self.optimizers)
        parallel.sum_gradients([p for group in groups for p in group.parameters])
        norms = {g.name: float(torch.nn.utils.clip_grad_norm_(g.parameters, g.norm)) for g in groups}
        if parallel.any_rank(not all(map(math.isfinite, norms.values()))):
            raise self._not_finite("gradient", "")
        for optimizer in self.optimizers:
            optimizer.step()
        self.stage.after_step(self.step)
        sums = _reduce(result.sums)
        sums.update({f"grad_norm/{name}" if name else "grad_norm": (norm, 1.0) for name, norm in norms.items()})
        return sums

    def _not_finite(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"{self.stage.name}: the {what} of step {self.step + 1} is not finite{where}; stopped before the update - "
            "lower the learning rate or look at the batch"
        )

    def _save(self) -> None:
        folder, keep = self.options.folder / "checkpoints", self.options.keep_checkpoints
        save_checkpoint(folder, self.step, self.stage.state_module, self.optimizers, self._facts(), keep)

    def _validate(self, log: MetricLog, total: int) -> None:
        """Let the hook measure at its interval and at the end, before the checkpoint of the same step is written."""
        hook, every = self.options.validation_hook, self.options.validate_every
        if hook is None or not every or (self.step % every and self.step != total):
            return
        started = time.perf_counter()
        figures: Mapping[str, float] = {}
        if parallel.rank() == 0:
            self.stage.module.eval()
            with torch.no_grad(), self.stage.evaluation_weights():
                figures = hook(self.stage, self.step, self.options.folder)
        parallel.barrier()
        named = {f"validation/{name}": value for name, value in figures.items()}
        log.record(self.step, named, time.perf_counter() - started)

    def _draw_samples(self) -> None:
        if self.options.sample_hook is not None and parallel.rank() == 0:
            self.stage.module.eval()
            with torch.no_grad(), self.stage.evaluation_weights():
                self.options.sample_hook(self.stage, self.step, self.options.folder / "samples")
        parallel.barrier()

    def _finish(self) -> None:
        beside = self.options.folder / ".final.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        self.stage.module.eval()
        with self.stage.evaluation_weights():
            self.stage.save_result(beside)
        facts = {
            "stage": self.stage.name,
            "steps": self.step,
            "digest": state_digest(self.stage.state_module, self.optimizers),
        }
        (beside / "training.json").write_text(json.dumps(facts, indent=1))
        seal(beside)
        publish(beside, self.result)


def is_finished(folder: Path) -> bool:
    """Return whether a stage's folder has an intact result; a damaged one is put aside, to be made again."""
    result = folder / "final"
    if not result.is_dir():
        return False
    fault = find_fault(result, surplus=True) if parallel.rank() == 0 else None
    if not parallel.any_rank(fault is not None):
        return True
    if parallel.rank() == 0:
        aside = folder / "final.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        result.rename(aside)
        logger.warning("%s is damaged: %s; it is put aside as %s and made again", result, fault, aside.name)
    parallel.barrier()
    return False


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers: nothing random outlives a step, so nothing needs to be stored."""
    return (seed * 1_000_003 + step * 65_537 + rank) % (1 << 62)


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the whole group is the engine's to handle


def _reduce(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
    """Add up the figures of all processes, in rank order; one may have figures that another has not."""
    own = {name: tuple(float(torch.as_tensor(value).detach()) for value in pair) for name, pair in sums.items()}
    merged: dict[str, tuple[float, float]] = {}
    for part in parallel.gather_objects(own):
        for name in sorted(part):
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + part[name][0], before[1] + part[name][1])
    return merged
