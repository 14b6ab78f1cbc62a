"""How fast a model is, and how far from the limit of this machine: one command, one run, one table.

    python benchmarks/nano.py [MODEL] [--threads N] [--repeat N] [--json]

README.md beside this file says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from PIL import Image

import vilau
from vilau.evaluation.generation_speed import work_per_position
from vilau.evaluation.machine import Clock, Probe, machine_name, measure, median, now, peak_memory

PROMPT = "a red apple on a blue background"
QUESTION = "what is this?"


def positions(pipe: vilau.Pipeline, pictures: int, probe: Probe, repeat: int) -> dict[str, float]:
    """Time the positions of `pictures` pictures with guidance, the machine's limits measured between them."""
    device = pipe.model.device
    spent: list[Clock] = []
    first: list[Clock] = []
    last = now(device)

    def progress(done: int, total: int) -> None:
        nonlocal last
        (first if done == 1 else spent).append(now(device) - last)
        if done % max(1, total // 4) == 0:
            probe.sample()
        last = now(device)

    for seed in range(repeat + 1):
        if seed == 1:
            first.clear(), spent.clear()
        last = now(device)
        pipe.draw(PROMPT, n=pictures, seed=seed, progress=progress)
    guided = pipe.model.visual_defaults().guidance_scale != 1
    prompt = pipe.processor.apply_chat_template([{"role": "user", "content": PROMPT}], generation_mode="image")[
        "input_ids"
    ].shape[1]
    length = prompt + pipe.model.config.vision_config.num_positions / 2
    work = work_per_position(pipe.model, pictures * (2 if guided else 1), length)
    out: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        taken = getattr(median(spent), clock)
        reading, computing = probe.limits(clock)
        floor = max(work.bytes_read / reading, work.operations / computing)
        out |= {f"{clock}_ms": taken * 1e3, f"{clock}_floor_ms": floor * 1e3, f"{clock}_floor_share": floor / taken}
        out[f"prefill_{clock}_ms"] = max(0.0, getattr(median(first), clock) - taken) * 1e3
    return out | {"megabytes_read": work.bytes_read / 1e6, "megaflop": work.operations / 1e6}


def run(model: str | None, device: str | None, repeat: int, megabytes: int, tower_batch: int) -> dict[str, Any]:
    """Measure everything and return it as plain values."""
    start = time.perf_counter()
    pipe = vilau.load(model, device)
    loaded = time.perf_counter() - start
    target, network = pipe.model.device, pipe.model
    size = network.config.vision_config.image_size
    picture = Image.new("RGB", (size, size), (220, 40, 40))
    items = {
        "picture": measure(lambda: pipe.draw(PROMPT, seed=0), repeat, target),
        "film_4_frames": measure(lambda: pipe.film(PROMPT, num_frames=4, seed=0), repeat, target),
        "answer": measure(lambda: pipe.ask(picture, QUESTION), repeat, target),
    }
    pixels = torch.rand(tower_batch, 3, size, size, device=target, dtype=network.dtype) * 2 - 1
    codes = network.vision_tower.encode(pixels)
    tower = {
        "encode": measure(lambda: network.vision_tower.encode(pixels), repeat, target),
        "decode": measure(lambda: network.vision_tower.decode(codes), repeat, target),
    }
    memory = peak_memory(target) / 1e6  # before the probe takes memory of its own
    probe = Probe(target, network.dtype, megabytes)
    per_position = {f"batch_{n}": positions(pipe, n, probe, repeat) for n in (1, 4)}
    reading, computing = probe.limits("wall")
    return {
        "model": str(model or "shipped"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "machine": {
            "device": machine_name(target),
            "dtype": str(network.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "read_gb_per_s": reading / 1e9,
            "matrix_gflop_per_s": computing / 1e9,
        },
        "load_s": loaded,
        "seconds": {name: asdict(clock) for name, clock in items.items()},
        "peak_memory_mb": memory,
        "tower_images_per_s": {name: tower_batch / clock.wall for name, clock in tower.items()},
        "position": per_position,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as aligned lines."""
    machine = result["machine"]
    lines = [
        f"model {result['model']}: {result['parameters'] / 1e6:.1f} M parameters, {machine['dtype']}, "
        f"{machine['threads']} threads on {machine['device']}",
        f"machine: reads {machine['read_gb_per_s']:.1f} GB/s, matrix products at {machine['matrix_gflop_per_s']:.0f} "
        "GFLOP/s",
        "",
        f"{'':24}{'wall':>10}{'cpu':>10}",
        *(f"{name:24}{c['wall']:>9.3f}s{c['cpu']:>9.3f}s" for name, c in result["seconds"].items()),
        f"{'load':24}{result['load_s']:>9.3f}s",
        f"{'peak memory':24}{result['peak_memory_mb']:>8.0f}MB",
        *(f"{'tower ' + name:24}{rate:>10.1f} images/s" for name, rate in result["tower_images_per_s"].items()),
        "",
        f"{'per position (ms)':24}{'wall':>10}{'floor':>10}{'share':>8}{'cpu':>10}{'floor':>10}{'share':>8}",
    ]
    for name, p in result["position"].items():
        cells = "".join(
            f"{p[f'{clock}_ms']:>10.2f}{p[f'{clock}_floor_ms']:>10.2f}{p[f'{clock}_floor_share']:>8.0%}"
            for clock in ("wall", "cpu")
        )
        lines.append(f"{name:24}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a model folder; the shipped model if absent")
    parser.add_argument("--device", help="cpu, cuda, ...; absent: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; absent: as torch chooses")
    parser.add_argument("--repeat", type=int, default=5, help="timed repetitions of each item (default 5)")
    parser.add_argument("--matrix-mb", type=int, default=1100, help="size of the matrix that bandwidth is read from")
    parser.add_argument("--tower-batch", type=int, default=16, help="pictures per call of the tower")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    if min(options.repeat, options.matrix_mb, options.tower_batch, options.threads or 1) < 1:
        parser.error("numbers must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = run(options.model, options.device, options.repeat, options.matrix_mb, options.tower_batch)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
