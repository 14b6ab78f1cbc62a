"""Stopping on request: signals are noted and obeyed between two steps; a marker file tells restarted workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

MARKER = "STOPPED"


class StopRequested(Exception):
    """A signal asked for an end; a complete checkpoint was written first. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """While entered, SIGTERM and SIGINT only leave their number in `number`; nothing changes off the main thread."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def mark_stopped(folder: Path, step: int) -> None:
    """Leave the marker 'stopped on request' in a stage's folder."""
    (folder / MARKER).write_text(f"stopped on request after step {step}\n")


def check_marker(folders: Iterable[Path], first: bool) -> None:
    """Obey or remove markers of an earlier stop.

    A worker that torchrun starts again finds the marker and leaves at once, as the end was wanted. A command given
    anew means that training shall go on: its `first` process removes the marker.

    Raises:
        StopRequested: this process was started again by torchrun after a stop on request.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    for folder in folders:
        marker = folder / MARKER
        if again and marker.is_file():
            raise StopRequested(f"{folder.name} was {marker.read_text().strip()}", 128 + signal.SIGTERM)
        if first and not again:
            marker.unlink(missing_ok=True)
