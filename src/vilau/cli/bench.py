"""`vilau bench`: how fast this machine makes pictures, and how far from its limit."""

from __future__ import annotations

import os
from typing import Any

import typer

from vilau.cli.common import (
    DEVICE_HELP,
    JSON_HELP,
    QUANTIZE_HELP,
    check_quantize,
    print_json,
    quiet_libraries,
    say,
    within,
)

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_BATCH = 1024


@app.callback()
def _group() -> None:
    """Keep `generate` a verb of its own however many there are."""


@app.command("generate", short_help="Time positions beside the machine's limits.")
def generate(
    model: str = typer.Argument(
        "nano",
        metavar="[MODEL|PRESET]",
        help="Folder or hub id of a model, or sizes with random weights: midsize, midsize-d16, 7b-256, 7b-384. "
        "nano is the shipped model.",
    ),
    batch: str = typer.Option("1,4", help="Numbers of pictures made at once, as 1,4,16."),
    positions: int = typer.Option(32, callback=within(1, 100_000), help="Positions timed of each batch."),
    threads: int | None = typer.Option(None, callback=within(1, 4096), help="CPU threads; as torch chooses if absent."),
    guidance_scale: float = typer.Option(3.0, callback=within(0, 100), help="1 runs no unconditional rows."),
    prompt_length: int = typer.Option(32, callback=within(1, 100_000), help="Tokens of each prompt."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16, float16; float32 on a CPU, bfloat16 on a GPU."),
    kernel: str | None = typer.Option(
        None, help="Layout of the weights on a CPU: plain, mkldnn, mkl; the fastest in a trial if absent."
    ),
    compile: bool = typer.Option(False, "--compile", help="Each position as one compiled function or captured graph."),
    quantize: str | None = typer.Option(None, help=QUANTIZE_HELP),
    pixels: bool = typer.Option(True, help="Time the vision tower too."),
    matrix_mb: int = typer.Option(
        1100, callback=within(1, 100_000), help="Size of the matrix that reading speed is measured with."
    ),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Time the positions of pictures beside the machine's own limits, measured in the same run.

    floor is the larger of bytes read / reading speed and operations / matrix rate; ratio is floor / measured: 1 is the
    limit. Times are medians; on a CPU those of its own clock, which other programs do not disturb much.
    """
    batches = parse_batches(batch)
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    check_quantize(quantize)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_libraries()
    import torch

    from vilau.evaluation.generation_speed import bench_generation, copy_note
    from vilau.evaluation.machine import Probe, machine_name

    if threads is not None:
        torch.set_num_threads(threads)
    network = load(model, device, dtype, quantize)
    note = copy_note(network)
    if note is not None and kernel is None:
        say(note)
    probe = Probe(network.device, network.dtype, matrix_mb)
    rows = bench_generation(
        network,
        model,
        batches,
        probe,
        pixels,
        on_row=None if as_json else lambda row: say(f"batch {row['batch']} done"),
        positions=positions,
        scale=guidance_scale,
        prompt_length=prompt_length,
        kernel=kernel,
        compile=compile,
    )
    machine = machine_name(network.device)
    if as_json:
        print_json([{**row, "machine": machine, "torch": torch.__version__} for row in rows])
        return
    typer.echo(f"{model} on {machine}, {rows[0]['threads']} threads, {rows[0]['dtype']}, torch {torch.__version__}\n")
    typer.echo(table(rows))


def parse_batches(text: str) -> list[int]:
    """Return the numbers of ``1,4,16``; ``BadParameter`` for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= LARGEST_BATCH for number in numbers):
        raise typer.BadParameter(f"batch is {text!r}: give numbers from 1 to {LARGEST_BATCH}, as 1,4,16")
    return numbers


def load(model: str, device: str | None, dtype: str | None, quantize: str | None = None) -> Any:
    """Return a model in evaluation mode: a preset with random weights, or one from a folder."""
    import torch

    from vilau import pipeline
    from vilau.evaluation.generation_speed import PRESETS, preset_model

    if model in PRESETS:
        target = pipeline.choose_device(device)
        chosen = dtype or ("float32" if target.type == "cpu" else "bfloat16")
        network = preset_model(model, target, getattr(torch, chosen))
        return network if quantize is None else network.quantize(quantize)
    return pipeline.load(None if model == "nano" else model, device, dtype, quantize).model


COLUMNS = (
    ("batch", "batch", "d"),
    ("cpu ms", "cpu_ms_per_position", ".1f"),
    ("wall ms", "wall_ms_per_position", ".1f"),
    ("lm", "lm_ms", ".1f"),
    ("depth", "depth_ms", ".1f"),
    ("sampling", "sampling_ms", ".1f"),
    ("other", "other_ms", ".1f"),
    ("floor ms", "floor_ms_per_position", ".1f"),
    ("ratio", "floor_ratio", ".2f"),
    ("prefill ms", "prefill_ms", ".0f"),
    ("encode ms", "encode_ms", ".0f"),
    ("decode ms", "decode_ms", ".0f"),
    ("peak MB", "peak_memory_mb", ".0f"),
    ("GB/s", "read_gb_per_s", ".1f"),
    ("GFLOP/s", "gflop_per_s", ".0f"),
    ("kernel", "kernel", "s"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; times are per position, but for prefill and the tower."""
    lines = [
        "| " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
    ]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for _, key, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
