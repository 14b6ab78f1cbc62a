"""The loop: any stage, any number of processes, exact resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from vilau.data.mixture import SkipCounts, describe_skips, share_skipped
from vilau.training import parallel
from vilau.training.batches import step_batches
from vilau.training.checkpoint import (
    find_fault,
    load_checkpoint,
    newest_intact,
    publish,
    save_checkpoint,
    seal,
    state_digest,
)
from vilau.training.config import ScaleConfig
from vilau.training.flops import peak_flops
from vilau.training.metrics import MetricLog
from vilau.training.sharded_checkpoint import is_sharded, load_sharded, save_sharded
from vilau.training.spread import Spread
from vilau.training.stage import ClipGroup, Stage, StepResult
from vilau.training.stopping import StopRequested, StopSignal, mark_stopped

logger = logging.getLogger(__name__)

_NORMS_KEPT = 50  # recent gradient norms that a spike is measured against
_NORMS_NEEDED = 10
_READ_NEEDED = 100  # samples before their share of bad ones can stop a run

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
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    skip_spikes: float = 0.0
    max_skipped_share: float = 1.0
    loggers: tuple[str, ...] = ("tensorboard",)


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
    spread: Spread = field(init=False)
    skipped: SkipCounts = field(init=False, default_factory=Counter)
    norms: list[float] = field(init=False, default_factory=list)

    @property
    def result(self) -> Path:
        """Folder of the finished stage."""
        return self.options.folder / "final"

    def run(self) -> Path:
        """Train until the configured step and return the folder with the result; a finished stage returns at once.

        A stop that arrives with the last step does not keep the stage from being finished; `stopped` then tells of it.

        Raises:
            TrainingError: a loss or gradient is not finite on any process (all stop before the update), too many
                samples are bad, or a checkpoint cannot be written or does not fit.
            ValueError: a switch of `scale` that this machine or stage cannot do.
            StopRequested: SIGTERM or SIGINT arrived; everything up to this step is in a checkpoint.
        """
        if is_finished(self.options.folder):
            return self.result
        self._check_batch_size()
        self.spread = Spread(self.stage, self.options.scale)
        self.optimizers = self.stage.build_optimizers()
        self._resume()
        self._loop()
        self._finish()
        return self.result

    def _check_batch_size(self) -> None:
        size, parts, processes = self.stage.config.batch_size, self.options.scale.accumulate, parallel.world_size()
        if size % (parts * processes):
            raise ValueError(
                f"stages.{self.stage.name}.batch_size {size} does not divide by {processes} processes times "
                f"{parts} micro-batches (scale.accumulate); choose a multiple of {parts * processes}"
            )

    def _facts(self) -> dict[str, Any]:
        config = self.stage.config
        return {
            "stage": self.stage.name,
            "seed": self.options.seed,
            "batch_size": config.batch_size,
            "steps": config.num_steps,
        }

    def _memory(self) -> dict[str, Any]:
        """What a resumed run knows of the steps before, beside weights and optimizers."""
        return {"norms": self.norms, "skipped": [[*key, count] for key, count in sorted(self.skipped.items())]}

    def _resume(self) -> None:
        path = newest_intact(self.options.folder / "checkpoints")
        if path is None:
            return
        try:
            load = load_sharded if is_sharded(path) else load_checkpoint
            state = load(path, self.stage.state_module, self.optimizers)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.step = int(state["step"])
        self.norms = list(state.get("norms", []))
        if parallel.rank() == 0:  # one process has the counts of all, so that adding up counts nothing twice
            self.skipped = Counter({tuple(key): count for *key, count in state.get("skipped", [])})
        changed = {name: (state.get(name, new), new) for name, new in self._facts().items()}
        for name, (old, new) in changed.items():
            if old != new:
                logger.warning("%s: goes on with %s %s instead of %s", self.stage.name, name, new, old)
        logger.info("%s: resuming after step %d from %s", self.stage.name, self.step, path.name)

    def _loop(self) -> None:
        total, options = self.stage.config.num_steps, self.options
        log = MetricLog(
            options.folder,
            self.stage.name,
            total,
            self.step,
            options.show_progress,
            options.loggers,
            peak_flops(self.spread.device, options.scale.precision == "bf16"),
        )
        with log:
            for batches, skips in step_batches(self.stage, self.step, options.scale.accumulate, options.workers):
                self.skipped += skips
                figures = self._train_step(batches)
                self.step += 1
                log.add(figures, self._held(batches))
                if options.on_step is not None:
                    options.on_step(self.step)
                if self.step % options.log_every == 0 or self.step == total:
                    log.report(self.step, self.optimizers[0].param_groups[0]["lr"])
                    self._count_skips()
                self._validate(log, total)
                self.stopped = parallel.any_rank(self.stop.number > 0)
                if self.stopped or self.step % options.save_every == 0 or self.step == total:
                    self._save()
                if self.step % options.sample_every == 0 or self.step == total:
                    self._draw_samples()
                if self.stopped and self.step < total:
                    raise self.stop_error()
            log.summarise(describe_skips(self.skipped, self.step * self.stage.config.batch_size))

    def _held(self, batches: list[Any]) -> dict[str, float]:
        held = {"samples": self.stage.config.batch_size / parallel.world_size()}
        for batch in batches:
            for name, amount in self.stage.work(batch).items():
                held[name] = held.get(name, 0.0) + amount
        return held

    def _count_skips(self) -> None:
        """Bring the counts of all processes together on the first; too large a share of bad samples ends the run."""
        parts = parallel.gather_objects(self.skipped)
        everyone: SkipCounts = Counter()
        for part in parts:
            everyone.update(part)
        self.skipped = everyone if parallel.rank() == 0 else Counter()
        used, limit = self.step * self.stage.config.batch_size, self.options.max_skipped_share
        share = share_skipped(everyone, used)
        if share > limit and used >= _READ_NEEDED:
            listed = "\n".join(describe_skips(everyone, used))
            raise TrainingError(
                f"{self.stage.name}: after step {self.step}, {share:.1%} of the samples read cannot be used, more than "
                f"max_skipped_share allows ({limit:.1%}); `vilau data check` finds them beforehand\n{listed}"
            )

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
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError | None) -> TrainingError:
        return TrainingError(
            f"{self.stage.name}: {error or 'the first process could not write'}; earlier checkpoints are as they "
            "were, and the same command goes on from the newest"
        )

    def _train_step(self, batches: list[Any]) -> dict[str, tuple[Any, Any]]:
        torch.manual_seed(step_seed(self.options.seed, self.step, parallel.rank()))
        self.stage.train_mode()
        self.stage.set_learning_rates(self.optimizers, self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        results = self.spread.forward_backward(self.stage.prepare(batches), self.step)
        loss = sum(float(result.loss) for result in results)
        where = parallel.ranks_where(not math.isfinite(loss))
        if where:
            raise self._not_finite("loss", f" on process {', '.join(map(str, where))}")
        groups = self.stage.clip_groups(self.optimizers)
        norms = {group.name: clip(group) for group in groups}
        if parallel.any_rank(not all(map(math.isfinite, norms.values()))):
            raise self._not_finite("gradient", "")
        spike = self._is_spike(next(iter(norms.values())))
        if not spike:
            for optimizer in self.optimizers:
                optimizer.step()
            self.stage.after_step(self.step)
        sums = add_up(results)
        if parallel.rank() == 0:  # all have the same
            sums.update({f"grad_norm/{name}" if name else "grad_norm": (norm, 1.0) for name, norm in norms.items()})
            if self.options.skip_spikes:
                sums["spikes_skipped"] = (float(spike), 1.0)
        return sums

    def _is_spike(self, norm: float) -> bool:
        """Return whether an update is to be left out: its norm is far above the median of recent ones."""
        if not self.options.skip_spikes:
            return False
        known = self.norms[-_NORMS_KEPT:]
        spike = len(known) >= _NORMS_NEEDED and norm > self.options.skip_spikes * statistics.median(known)
        if spike:
            logger.warning("%s: step %d is left out: gradient norm %.3g", self.stage.name, self.step + 1, norm)
        self.norms = [*known, norm][-_NORMS_KEPT:]
        return spike

    def _not_finite(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"{self.stage.name}: the {what} of step {self.step + 1} is not finite{where}; stopped before the update - "
            "lower the learning rate or look at the batch"
        )

    def _save(self) -> None:
        if self.skipped or parallel.world_size() > 1:
            self._count_skips()
        folder, keep = self.options.folder / "checkpoints", self.options.keep_checkpoints
        facts = self._facts() | self._memory()
        module = self.stage.state_module
        if not self.spread.sharded:
            self._on_first(lambda: save_checkpoint(folder, self.step, module, self.optimizers, facts, keep))
            return
        try:
            save_sharded(folder, self.step, module, self.optimizers, facts, keep)
        except OSError as error:
            raise self._cannot_write(error) from error

    @contextmanager
    def _for_evaluation(self) -> Iterator[bool]:
        """Tell the first process, which alone evaluates and writes, that it is; it then has the weights for that."""
        self.stage.module.eval()
        with self.stage.evaluation_weights(), self.spread.whole_weights():
            yield parallel.rank() == 0
        parallel.barrier()

    def _validate(self, log: MetricLog, total: int) -> None:
        """Let the hook measure at its interval and at the end, before the checkpoint of the same step is written."""
        hook, every = self.options.validation_hook, self.options.validate_every
        if hook is None or not every or (self.step % every and self.step != total):
            return
        with self._for_evaluation() as first:
            if first:
                figures = hook(self.stage, self.step, self.options.folder)
                log.record(self.step, {f"validation/{name}": value for name, value in figures.items()})

    def _draw_samples(self) -> None:
        if self.options.sample_hook is None:
            return
        with self._for_evaluation() as first, torch.no_grad():
            if first:
                self.options.sample_hook(self.stage, self.step, self.options.folder / "samples")

    def _finish(self) -> None:
        digest = ""
        if self.spread.sharded or parallel.rank() == 0:
            digest = state_digest(self.stage.state_module, self.optimizers)
        with self._for_evaluation():
            self._on_first(lambda: self._write_result(digest))

    def _write_result(self, digest: str) -> None:
        beside = self.options.folder / ".final.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        self.stage.save_result(beside)
        facts = {"stage": self.stage.name, "steps": self.step, "digest": digest}
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


def clip(group: ClipGroup) -> float:
    """Scale the gradients of a group down to its norm if they are above it; return the norm they had."""
    norm = torch.nn.utils.clip_grad_norm_(group.parameters, group.norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def add_up(results: list[StepResult]) -> dict[str, tuple[Any, Any]]:
    """Add up the figures of a step's micro-batches; one may have figures that another has not."""
    merged: dict[str, tuple[Any, Any]] = {}
    for result in results:
        for name, (total, count) in result.sums.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + total, before[1] + count)
    return merged
