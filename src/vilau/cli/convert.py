"""`vilau convert`: between the released layout and ours, from a training stage to a model folder, from an RQ-VAE."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import QUANTIZE_HELP, check_quantize, within

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: Path = typer.Argument(
        ...,
        metavar="SRC",
        help="A released checkpoint (or its hub id), a model folder, a stage's `final` folder, or an RQ-VAE.",
    ),
    target: Path = typer.Argument(..., metavar="DST", help="The new model folder."),
    to: str = typer.Option("ours", help="The layout of DST: ours or released."),
    dtype: str | None = typer.Option(
        None, help="How weights are stored: float32, bfloat16, float16. As in SRC if absent; bfloat16 from training."
    ),
    guidance_scale: float | None = typer.Option(
        None, callback=within(0, 100), help="Default guidance of pictures and films (from training)."
    ),
    temperature: float | None = typer.Option(
        None, callback=within(0, 100), help="Default temperature of codes (from training)."
    ),
    card: Path | None = typer.Option(None, help="A Markdown file that becomes the model card (from training)."),
    ema: bool = typer.Option(False, "--ema", help="Take the averaged weights (from an RQ-VAE)."),
    quantize: str | None = typer.Option(None, help=QUANTIZE_HELP),
    force: bool = typer.Option(False, "--force", help="Replace DST if it exists."),
) -> None:
    """Convert a checkpoint, tensor by tensor; an interrupted conversion goes on where it stopped.

    From a training result: weights in half precision, the codebook in float32, with everything that loading needs.
    From an RQ-VAE: a folder for VisionTower.from_pretrained and `init_from`; what stays random is listed.
    """
    if to not in ("ours", "released"):
        raise typer.BadParameter(f"{to!r} is no layout: it must be ours or released", param_hint="--to")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    check_quantize(quantize)
    from vilau.checkpoints.layout import find_layout, resolve
    from vilau.checkpoints.rqvae import is_rqvae

    given = {"visual_guidance_scale": guidance_scale, "visual_temperature": temperature}
    sampling = {name: value for name, value in given.items() if value is not None}
    if not source.exists():
        source = resolve(source)
    if quantize is not None:
        if sampling or card is not None or ema or to != "ours" or is_rqvae(source):
            raise ValueError("--quantize goes with --dtype and --force alone, from a whole model to our layout")
        typer.echo(str(_quantised(source, target, quantize, dtype, force)))
        return
    if is_rqvae(source):
        if sampling or card is not None or dtype is not None or to != "ours":
            raise ValueError("an RQ-VAE becomes a vision tower of ours in float32: only --ema and --force apply to it")
        _from_rqvae(source, target, ema, force)
        return
    if ema:
        raise ValueError(f"--ema belongs to the conversion of an RQ-VAE, and {source} is none")
    if to == "ours" and find_layout(source) == "ours":
        from vilau.checkpoints.export import export_model

        text = card.read_text(encoding="utf-8") if card is not None else None
        typer.echo(str(export_model(source, target, dtype or "bfloat16", sampling, text, force)))
        return
    if sampling or card is not None:
        raise ValueError("--guidance-scale, --temperature and --card belong to the conversion of a training result")
    typer.echo(str(_between_layouts(source, target, to, dtype, force)))


def _quantised(source: Path, target: Path, quantize: str, dtype: str | None, force: bool) -> Path:
    """Write a quantised model with its processor; what is not quantised in `dtype`, float32 if absent."""
    import shutil

    from vilau import pipeline
    from vilau.checkpoints.target import check_target, partial_folder, put_in_place
    from vilau.cli.common import quiet_libraries

    check_target(source, target, force)
    quiet_libraries()
    loaded = pipeline.load(source, "cpu", dtype, quantize)
    beside = partial_folder(target)
    shutil.rmtree(beside, ignore_errors=True)
    loaded.model.save_pretrained(beside)
    loaded.processor.save_pretrained(beside)
    return put_in_place(target)


def _from_rqvae(source: Path, target: Path, ema: bool, force: bool) -> None:
    """Convert, and name on stderr what the file did not have."""
    from vilau.checkpoints.rqvae import convert_rqvae
    from vilau.checkpoints.shards import listed
    from vilau.cli.common import quiet_libraries, say

    quiet_libraries()
    random = convert_rqvae(source, target, ema, force).random
    say(f"an RQ-VAE knows no text: {len(random)} tensors are random until they are trained: {listed(random, 4)}")
    typer.echo(str(target))


def _between_layouts(source: Path, target: Path, to: str, dtype: str | None, force: bool) -> Path:
    """Convert with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from vilau.checkpoints.convert import convert as run
    from vilau.checkpoints.target import partial_folder
    from vilau.cli.common import quiet_libraries

    quiet_libraries()
    console = Console(stderr=True)
    if partial_folder(target).is_dir():
        console.print(f"an earlier conversion to {target} was interrupted; what fits is used", highlight=False)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=console)
    task = bar.add_task("convert", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # with the first tensor: what is refused has no bar
        bar.update(task, completed=done, total=total)

    try:
        return run(source, target, to, dtype, force, show)
    finally:
        bar.stop()
