"""`vilau data`: build, look at and check the data that models are trained on."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.codes import codes
from vilau.cli.common import JSON_HELP, print_json, within
from vilau.cli.data_check import check
from vilau.cli.data_convert import convert
from vilau.cli.data_inspect import inspect

app = typer.Typer(help="Build, look at and check training data.", rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Build, look at and check training data."""


app.command("inspect", short_help="Show what is there and what a model would learn.")(inspect)
app.command("check", short_help="Read everything once and list what is wrong.")(check)
app.command("codes", short_help="Run the tower over a stage's data once.")(codes)
app.command("convert", short_help="Turn old pickle shards into safe files.")(convert)


@app.command("nano", short_help="Build the nano world's shards and manifest.")
def nano(
    out: Path = typer.Option(..., "--out", help="Folder to write; it appears whole or not at all."),
    samples: int = typer.Option(
        10_000,
        callback=within(1, 100_000_000),
        help="Training samples, spread over the forms; a tenth as many held-out ones come on top.",
    ),
    styles: list[str] = typer.Option(["noto"], "--style", help="Emoji art: noto, twemoji; may be given twice."),
    image_size: int = typer.Option(32, callback=within(8, 1024), help="Side of the pictures, pixels."),
    frames: int = typer.Option(4, callback=within(1, 64), help="Frames of a film."),
    seed: int = typer.Option(0, callback=within(0, 2**31), help="Another seed, other samples."),
    cache: Path | None = typer.Option(None, help="Folder of the fetched packages; the user's cache if absent."),
    offline: bool = typer.Option(False, "--offline", help="Take the shipped sprites and fetch nothing."),
    force: bool = typer.Option(False, "--force", help="Replace nano data that is there."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Build the nano world's shards, manifest, licences and attribution from registry packages."""
    from dataclasses import asdict

    from vilau.data.nano.build import build_nano

    manifest = build_nano(
        out,
        samples=samples,
        styles=tuple(styles),
        cache=cache,
        force=force,
        download=not offline,
        image_size=image_size,
        num_frames=frames,
        seed=seed,
    )
    if as_json:
        print_json({"out": str(out), **asdict(manifest)})
        return
    typer.echo(str(out))
