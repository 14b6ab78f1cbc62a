"""What a run tells while it trains: progress with rates and time left, a JSON line per report, tensorboard or wandb."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vilau.training import parallel

_FLOPS = "flops"


class _Writer(Protocol):
    """Where figures of a step go."""

    def write(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """Averages figures between reports; reports are made by all processes together, the first one writes and draws.

    Args:
        folder: of the stage; gets ``metrics.jsonl`` and, if asked for, ``tensorboard``.
        stage, total, start: name, steps, and the step from which this run goes on.
        show_progress: on stderr: a bar on a terminal, a line per report elsewhere.
        loggers: `tensorboard`, `wandb`.
        peak: operations per second that one process's hardware can do, 0 if unknown.

    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        total: int,
        start: int,
        show_progress: bool,
        loggers: Sequence[str] = ("tensorboard",),
        peak: float = 0.0,
    ) -> None:
        self.active = parallel.rank() == 0
        self.stage, self.total, self.start, self.peak = stage, total, start, peak
        self.reported = start
        self.pending: list[Mapping[str, tuple[Any, Any]]] = []
        self.work: dict[str, float] = {}
        self.tokens = 0.0
        self.since = self.begun = time.perf_counter()
        self.means: dict[str, float] = {}
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.folder, self.loggers = folder, loggers
        self.writers: list[_Writer] = []
        self.console = Console(file=sys.stderr)
        self.show = show_progress and self.active

    def __enter__(self) -> MetricLog:
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writers = [_WRITERS[name](self.folder, self.stage, self.start) for name in self.loggers]
            self.lines = _reopen(self.folder / "metrics.jsonl", self.start)
        if self.show and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task(self.stage, total=self.total, completed=self.start, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.active:
            for writer in self.writers:
                writer.close()
            self.lines.close()

    def add(self, sums: Mapping[str, tuple[Any, Any]], work: Mapping[str, float]) -> None:
        """Take in one step of this process: figures as (sum, count), and what it held (samples, images, flops)."""
        self.pending.append(sums)
        for name, amount in work.items():
            self.work[name] = self.work.get(name, 0.0) + amount
        if self.progress is not None and self.task is not None:
            self.progress.advance(self.task)

    def report(self, step: int, lr: float) -> None:
        """Write the averages of all processes since the last report and start anew; every process must call this."""
        sums, work = _over_ranks(self.pending, self.work)
        self.tokens += work.get("tokens", 0.0)
        wall = time.perf_counter() - self.since
        self.means = {name: total / count for name, (total, count) in sums.items() if count}
        rates = {f"{name}_per_second": amount / wall for name, amount in work.items() if name != _FLOPS}
        if self.peak and work.get(_FLOPS):
            rates["mfu"] = work[_FLOPS] / wall / (self.peak * parallel.world_size())
        if self.active:
            self.record(step, {"lr": lr, **rates, **self.means})
        self._show(step, rates, wall)
        self.reported, self.since = step, time.perf_counter()
        self.pending, self.work = [], {}

    def _show(self, step: int, rates: Mapping[str, float], wall: float) -> None:
        shown = [f"{rate:.3g} {n.removesuffix('_per_second')}/s" for n, rate in rates.items() if n != "mfu"]
        shown += [f"mfu {rates['mfu']:.0%}"] if "mfu" in rates else []
        shown += [f"{n} {value:.3g}" for n, value in sorted(self.means.items()) if "/" not in n]
        figures = " ".join(shown)
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, figures=figures)
        elif self.show:
            left = (self.total - step) * wall / max(1, step - self.reported)
            self._tell(f"{self.stage} {step}/{self.total} {figures} left {_span(left)}")

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures under their own names, such as those of a validation."""
        if not self.active or not figures:
            return
        for writer in self.writers:
            writer.write({f"{self.stage}/{name}": value for name, value in figures.items()}, step)
        self.lines.write(json.dumps({"stage": self.stage, "step": step, **figures}) + "\n")
        self.lines.flush()

    def summarise(self, remarks: Sequence[str] = ()) -> None:
        """Say at the end of a stage what this call did in which time, what the last figures were, and the remarks."""
        if not self.show:
            return
        taken = _span(time.perf_counter() - self.begun)
        figures = ", ".join(f"{n} {value:.4g}" for n, value in sorted(self.means.items()) if "/" not in n)
        done = self.reported - self.start
        tokens = f", {self.tokens:,.0f} tokens" if self.tokens else ""
        self._tell(f"{self.stage}: {done} steps{tokens} in {taken}; {figures}")
        for line in remarks:
            self._tell(line)

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)  # one record, one line


def _span(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Tensorboard:
    def __init__(self, folder: Path, stage: str, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, stage: str, start: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "loggers names wandb, which is not installed: pip install wandb, or leave it out"
            ) from error
        name = f"{folder.parent.name}-{stage}"
        self.run: Any = wandb.init(project="vilau", name=name, id=name, resume="allow", dir=str(folder))

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


_WRITERS: dict[str, type[_Tensorboard] | type[_Wandb]] = {"tensorboard": _Tensorboard, "wandb": _Wandb}


def _over_ranks(
    pending: Sequence[Mapping[str, tuple[Any, Any]]], work: Mapping[str, float]
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Add up the figures of all steps and processes, in rank order; one may have figures that another has not."""
    own: dict[str, tuple[float, float]] = {}
    for sums in pending:
        for name, pair in sums.items():
            total, count = (float(torch.as_tensor(value)) for value in pair)
            before = own.get(name, (0.0, 0.0))
            own[name] = (before[0] + total, before[1] + count)
    merged: dict[str, tuple[float, float]] = {}
    amounts: dict[str, float] = {}
    for figures, held in parallel.gather_objects((own, dict(work))):
        for name in sorted(figures):
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + figures[name][0], before[1] + figures[name][1])
        for name, amount in held.items():
            amounts[name] = amounts.get(name, 0.0) + amount
    return merged, amounts


def _reopen(path: Path, start: int) -> TextIO:
    """Open the JSON lines for appending, without those of steps that a killed process did after its last checkpoint."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if line.endswith("\n") and json.loads(line)["step"] <= start:
            kept.append(line)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.rename(path)
    return path.open("a", encoding="utf-8")
