"""What a run tells while it trains: a progress bar with rate and time left, tensorboard, and a JSON line per report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from vilau.training import parallel


class MetricLog:
    """Averages figures between reports; only the first process writes and draws."""

    def __init__(self, folder: Path, stage: str, total: int, start: int, show_progress: bool) -> None:
        self.active = parallel.rank() == 0
        self.stage, self.total, self.start = stage, total, start
        self.reported = start
        self.sums: dict[str, tuple[float, float]] = {}
        self.samples, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.folder = folder
        self.console = Console(file=sys.stderr)
        self.show = show_progress and self.active

    def __enter__(self) -> MetricLog:
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start)
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
            self.writer.close()
            self.lines.close()

    def add(self, sums: dict[str, tuple[float, float]], samples: int, seconds: float) -> None:
        """Take in one step's figures."""
        for name, (total, count) in sums.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + count)
        self.samples += samples
        self.seconds += seconds
        if self.progress is not None and self.task is not None:
            self.progress.advance(self.task)

    def report(self, step: int, lr: float) -> None:
        """Write the averages since the last report and start anew."""
        wall = time.perf_counter() - self.since
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        rate = self.samples / wall
        if self.active:
            for name, value in {**means, "lr": lr, "samples_per_second": rate}.items():
                self.writer.add_scalar(f"{self.stage}/{name}", value, step)
            record = {"stage": self.stage, "step": step, "lr": lr, "samples_per_second": rate, **means}
            self.lines.write(json.dumps(record) + "\n")
            self.lines.flush()
        figures = f"{rate:.0f}/s " + " ".join(f"{n} {v:.3g}" for n, v in sorted(means.items()) if "/" not in n)
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, figures=figures)
        elif self.show:
            left = (self.total - step) * wall / max(1, step - self.reported)
            self.console.print(f"{self.stage} {step}/{self.total} {figures} left {left / 60:.0f} min", highlight=False)
        self.reported = step
        self.sums, self.samples, self.seconds, self.since = {}, 0, 0.0, time.perf_counter()

    def record(self, step: int, figures: Mapping[str, float], seconds: float = 0.0) -> None:
        """Write figures that are no averages over steps, such as those of a validation, under their own names.

        `seconds` that it took to measure them are left out of the rate of the next report.
        """
        self.since += seconds
        if not self.active:
            return
        for name, value in figures.items():
            self.writer.add_scalar(f"{self.stage}/{name}", value, step)
        self.lines.write(json.dumps({"stage": self.stage, "step": step, **figures}) + "\n")
        self.lines.flush()


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
