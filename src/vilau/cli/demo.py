"""`vilau demo`: the main job, shown on one page."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import DEVICE_HELP, MODEL_HELP


def demo(
    out: Path = typer.Option(Path("demo"), "--out", help="Folder to write to; created if absent."),
    model: str | None = typer.Option(None, help=MODEL_HELP),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
) -> None:
    """Draw, film, describe, answer and talk; prints the paths of one HTML page and one contact sheet."""
    raise ValueError("not written yet")
