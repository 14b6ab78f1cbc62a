"""`vilau parity`: agreement with the published reference, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import JSON_HELP, print_json, quiet_libraries, say


def parity(
    folder: Path = typer.Argument(..., metavar="GOLDEN_DIR", help="A folder with ckpt/ and outputs.safetensors."),
    only: list[str] = typer.Option([], help="Check only tensors whose names begin so; may be given several times."),
    device: str = typer.Option("cpu", help="Where to compute, always in float32."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> int:
    """Load the checkpoint in a golden folder, recompute every tensor beside it and show how far each is off.

    Exit code 1 when a tensor is beyond its tolerance. Tensors that follow a rule of the reference which this project
    does not share are recomputed by that rule and marked so.
    """
    quiet_libraries()
    from vilau.evaluation.parity import check_folder

    report = check_folder(folder, device, only, progress=lambda name: say(name))
    if as_json:
        print_json(report.to_dict())
    else:
        for line in report.table():
            typer.echo(line)
    return 0 if report.holds else 1
