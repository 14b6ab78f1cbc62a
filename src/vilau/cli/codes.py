"""`vilau data codes`: compute the codes of everything that a language stage reads, once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from vilau.cli.common import quiet_libraries, say, within

if TYPE_CHECKING:
    from vilau.training.config import StageName


def codes(
    config: Path = typer.Argument(..., metavar="CONFIG", help="Training configuration with the stage."),
    out: Path = typer.Option(..., "--out", help="Folder for the stores; name it as stages.STAGE.codes afterwards."),
    stage: str = typer.Option("pretrain", "--stage", help="pretrain or sft."),
    tower: Path | None = typer.Option(
        None, "--tower", help="Tower or model; the stage's init_from, or the stage before it, if absent."
    ),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change a key of the configuration."),
    device: str = typer.Option("auto", help="cpu, cuda, ...; the GPU if there is one."),
    verify: float = typer.Option(0.01, callback=within(0, 1), help="Share of samples to encode again and compare."),
) -> None:
    """Run the vision tower over a stage's data and store the codes, so that training touches no pixels.

    The tower is frozen in pretrain and sft and pictures are not augmented there, so training from codes equals
    training from pixels. Shards that exist are kept: the same command goes on after a stop, and several
    processes (torchrun --nproc-per-node N -m vilau data codes ...) share the shards, each on a GPU of its own.
    """
    from vilau.cli.settings import read_settings

    settings = read_settings(config, overrides)
    quiet_libraries()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vilau.pipeline import choose_device
    from vilau.tower import VisionTower
    from vilau.training.precompute import check_codes, encoder_of, find_tower, frames_of, make_codes, plan_codes

    part, parts = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if stage not in settings.stages:
        raise typer.BadParameter(f"{stage!r} is not a stage of {config}; it has {', '.join(settings.stages)}")
    name = cast("StageName", stage)
    folder = tower or find_tower(settings, name)
    network = VisionTower.from_pretrained(folder).eval().to(choose_device(device))
    plans = plan_codes(settings, name, network, frames_of(settings, folder), out)
    encode = encoder_of(network)
    for plan in plans:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=part != 0) as progress:
            task = progress.add_task(plan.folder.name, total=plan.info.samples)
            shards = make_codes(plan, encode, part, parts, lambda task=task: progress.advance(task))  # type: ignore[misc]
        say(f"{plan.folder}: {shards} of {plan.info.shards} shards written")
        if verify and part < plan.info.shards:  # each process checks the shards that are its own
            checked = check_codes(plan, encode, verify, part, parts)
            say(f"{plan.folder}: {checked} frames encoded again and found equal")
    typer.echo(str(out))
