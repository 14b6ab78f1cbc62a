"""`vilau eval`: measure a model with a fixed suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from vilau.cli.common import (
    DEVICE_HELP,
    JSON_HELP,
    MODEL_HELP,
    QUANTIZE_HELP,
    check_quantize,
    check_targets,
    print_json,
    quiet_libraries,
    say,
    within,
)
from vilau.files import write_text

SUITES = ("nano", "tower", "edits")


def evaluate(
    model: str | None = typer.Argument(None, metavar="[MODEL]", help=MODEL_HELP),
    suite: str = typer.Option(
        "nano", help="nano: the whole model; tower: a vision tower, alone or in a whole model; edits: beyond the paper."
    ),
    extractor: str | None = typer.Option(
        None, help="Suite tower: features of the Fréchet distance, a TorchScript file; the shipped judge's if absent."
    ),
    limit: int | None = typer.Option(
        None, callback=within(1, 10**9), help="At most this many items per metric; all if absent."
    ),
    seed: int = typer.Option(0, callback=within(0, 2**63 - 1), help="Seed of everything drawn at random."),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    quantize: str | None = typer.Option(None, help=QUANTIZE_HELP + " Suite nano."),
    out: Path | None = typer.Option(None, "--out", help="Also write the JSON to this file."),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing file."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Measure a model: metrics, their ceilings, and how many items each had. A repeat gives the same figures."""
    if suite not in SUITES:
        raise typer.BadParameter(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if out is not None:
        check_targets([out], force)
    if extractor is not None and suite != "tower":
        raise typer.BadParameter("--extractor is for the tower suite: add --suite tower")
    check_quantize(quantize)
    if quantize is not None and suite != "nano":
        raise typer.BadParameter("--quantize is for the nano suite: a vision tower stays float")
    result = _measure(model, suite, limit, seed, device, extractor, quantize)
    if out is not None:
        write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", out)
    if as_json:
        print_json(result)
        return
    for line in table(result):
        typer.echo(line)


def _measure(
    model: str | None,
    suite: str,
    limit: int | None,
    seed: int,
    device: str | None,
    extractor: str | None,
    quantize: str | None,
) -> dict[str, Any]:
    from vilau.shipped import find_model, find_tower

    folder = (find_tower if suite == "tower" else find_model)(model)
    quiet_libraries()
    if suite == "tower":
        from vilau.evaluation.tower_suite import run_tower_suite

        return run_tower_suite(folder, limit=limit, seed=seed, device=device, extractor=extractor)
    if suite == "edits":
        from vilau.evaluation.edits import run_edits

        return run_edits(folder, limit=limit, seed=seed, device=device, progress=say)
    from vilau.evaluation.nano import run_suite

    return run_suite(folder, limit=limit, seed=seed, device=device, progress=say, quantize=quantize)


def table(result: dict[str, Any]) -> list[str]:
    """Metrics beside their ceilings (or what guessing reaches) and sample counts, as lines for people."""
    beside = "chance" if "chance" in result else "ceiling"
    lines = [f"{'metric':<26} {'value':>9} {beside:>9} {'items':>7}"]
    ceilings, samples = result.get("chance") or result.get("ceilings", {}), result.get("samples", {})
    for name, value in result["metrics"].items():
        ceiling = f"{ceilings[name]:.3f}" if name in ceilings else "-"
        shown = "-" if value is None else f"{value:.3f}"
        lines.append(f"{name:<26} {shown:>9} {ceiling:>9} {samples.get(name, '-')!s:>7}")
    lines += [
        f"ceiling of {name:<15} {value:>9.3f}" for name, value in ceilings.items() if name not in result["metrics"]
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in result.get("left_out", {}).items()]
    return lines
