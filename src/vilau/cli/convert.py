"""`vilau convert`: from a finished training stage to a model folder for users."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import within


def convert(
    source: Path = typer.Argument(..., metavar="SRC", help="The `final` folder of stage pretrain or sft."),
    target: Path = typer.Argument(..., metavar="DST", help="The new model folder."),
    dtype: str = typer.Option("bfloat16", help="How weights are stored: float32, bfloat16, float16."),
    guidance_scale: float | None = typer.Option(
        None, callback=within(0, 100), help="Default guidance of pictures and films."
    ),
    temperature: float | None = typer.Option(None, callback=within(0, 100), help="Default temperature of codes."),
    card: Path | None = typer.Option(None, help="A Markdown file that becomes the model card."),
    force: bool = typer.Option(False, "--force", help="Replace DST if it exists."),
) -> None:
    """Store the weights in half precision (the codebook in float32) with everything that loading needs."""
    from vilau.checkpoints.export import export_model

    given = {"visual_guidance_scale": guidance_scale, "visual_temperature": temperature}
    sampling = {name: value for name, value in given.items() if value is not None}
    text = card.read_text(encoding="utf-8") if card is not None else None
    typer.echo(str(export_model(source, target, dtype, sampling, text, force)))
