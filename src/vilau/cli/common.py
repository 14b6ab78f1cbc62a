"""What the verbs share: loading quietly, checked numbers, output files, progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from vilau.pipeline import Pipeline

LONGEST_ERROR = 600
SMALL_MODEL = 50_000_000  # parameters

MODEL_HELP = "Folder or hub id of a model; the shipped one if absent."
DEVICE_HELP = "cpu, cuda, cuda:1, mps; the GPU if there is one."
QUANTIZE_HELP = "int8: the language model and the depth transformer in 8 bits; as stored if absent."
QUANTIZATIONS = ("int8",)
JSON_HELP = "Print JSON, and nothing else, on stdout."


def one_line(error: BaseException) -> str:
    """An error as one line of bearable length."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 4] + " ..."


def within(low: float, high: float, above: bool = False) -> Callable[[Any], Any]:
    """Return a check of an option's value: finite, from ``low`` (with ``above``: not ``low``) to ``high``."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise typer.BadParameter(f"{value} is out of range: it must be {limits}")
        return value

    return check


def say(message: str) -> None:
    """Print a line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


class Ticker:
    """A counter that rewrites one line of a terminal's stderr, and is silent elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.live = sys.stderr.isatty()
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        now = time.monotonic()
        if not self.live or (now - self.last < 0.1 and done < total):
            return
        self.last = now
        sys.stderr.write(f"\r\x1b[K{self.what}: {done}/{total}")
        if done >= total:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off the terminal."""
    import logging

    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def load_pipeline(model: str | None, device: str | None) -> Pipeline:
    """Load a model for a command; ``ValueError`` in one line when that fails."""
    from vilau.shipped import find_model

    find_model(model)
    quiet_libraries()
    from vilau.pipeline import load

    pipeline = load(model, device)
    if pipeline.model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        use_one_thread_if_small(pipeline.model.num_parameters())
    return pipeline


def use_one_thread_if_small(parameters: int) -> None:
    """Compute on one thread with a model too small to share: its threads would wait for each other most of the time.

    A picture of the shipped model took 0.38 s with two threads and 0.14 s with one.
    """
    import torch

    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)


def check_targets(targets: Sequence[Path], force: bool) -> None:
    """Refuse, before any work, what could not be written in the end.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: one line that names the file and the remedy.
    """
    for target in targets:
        parent = target.parent
        if not parent.is_dir():
            raise FileNotFoundError(f"there is no folder {parent} to write {target.name} into: create it first")
        if target.is_dir():
            raise ValueError(f"cannot write {target}: it is a folder")
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists: add --force to overwrite it")
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"cannot write into the folder {parent}: permission denied")


def shown_model(model: str | None) -> str:
    """The model's name for people and JSON."""
    return "shipped" if model is None else str(model)


def check_quantize(name: str | None) -> None:
    """Raise ``BadParameter`` for a quantisation that there is not."""
    if name is not None and name not in QUANTIZATIONS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(QUANTIZATIONS)}", param_hint="--quantize")
