"""Positions in int8 against float32, eager and compiled, all in turns in one process (docs/int8.md).

    python benchmarks/int8_speed.py [--preset midsize] [--batch 1,4] [--positions 24] [--no-compile] [--json]

Each way runs five positions at a time, the first of which is not counted: it finds the processor's caches full of
another way's weights, as no user of one model does. Times are medians of the processor time of one thread. The floor
is that of the weights in their own type, by the reading speed and matrix rate measured between the turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch

from vilau.evaluation.generation_speed import bench_request, preset_model, work_per_position
from vilau.evaluation.machine import Probe, machine_name
from vilau.generation.compiled import visual_step
from vilau.generation.position import VisualStep
from vilau.generation.prepared import kernel_of
from vilau.generation.visual import Begun, begin

CPU = torch.device("cpu")
PROMPT = 32
TURN = 5  # positions of one way before the next has its turn
WARM_UP = 3


class Way:
    """One way to make the positions of some pictures, with its own model, step and cache."""

    def __init__(self, name: str, model: Any, pictures: int, positions: int, compile: bool) -> None:
        self.name, self.model, self.times = name, model, list[float]()
        steps = positions * TURN // (TURN - 1) + TURN + WARM_UP + 2
        request = bench_request(model, pictures, PROMPT, 3.0, steps)
        self.rows = len(request.prompts.rows)
        self.step: VisualStep = visual_step(model, self.rows, compile=compile)
        self.kernel = "compiled" if self.step.static else kernel_of(self.step.networks)
        self.begun: Begun = begin(self.step.networks, request, self.step.static)
        self.step.draw(self.begun.hidden, self.begun.state)
        for _ in range(WARM_UP):
            self.step(self.begun.state, self.begun.language)

    def turn(self) -> None:
        """Run some positions and note all times but the first."""
        for number in range(TURN):
            start = time.process_time()
            self.step(self.begun.state, self.begun.language)
            if number:
                self.times.append((time.process_time() - start) * 1e3)


@torch.no_grad()
def measure(models: dict[str, Any], pictures: int, positions: int, compile: bool, probe: Probe) -> list[dict[str, Any]]:
    """Return a row for every way: milliseconds per position, floor, and how much faster int8 is than float32."""
    ways = [
        Way(name, model, pictures, positions, compiled)
        for compiled in ((False, True) if compile else (False,))
        for name, model in models.items()
    ]
    probe.clear()
    for _ in range(-(-positions // (TURN - 1))):
        for way in ways:
            way.turn()
        probe.sample()
    reading, computing = probe.limits("cpu")
    rows = []
    for way in ways:
        work = work_per_position(way.model, way.rows, PROMPT + positions / 2)
        spent, floor = statistics.median(way.times), max(work.bytes_read / reading, work.operations / computing) * 1e3
        rows.append(
            {
                "batch": pictures,
                "weights": way.name,
                "compiled": way.step.static,
                "kernel": way.kernel,
                "cpu_ms_per_position": spent,
                "least_ms": min(way.times),
                "most_ms": max(way.times),
                "floor_ms_per_position": floor,
                "floor_ratio": floor / spent,
            }
        )
    for row in rows:
        beside = next(r for r in rows if r["compiled"] == row["compiled"] and r["weights"] == "float32")
        row["times_faster"] = beside["cpu_ms_per_position"] / row["cpu_ms_per_position"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of `measure`."""
    lines = [
        "| pictures | way | weights | kernel | cpu ms (least to most) | floor ms | ratio | times float32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['batch']} | {'compiled' if row['compiled'] else 'eager'} | {row['weights']} | {row['kernel']} "
        f"| {row['cpu_ms_per_position']:.1f} ({row['least_ms']:.1f} to {row['most_ms']:.1f}) "
        f"| {row['floor_ms_per_position']:.1f} | {row['floor_ratio']:.2f} | {row['times_faster']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="midsize")
    parser.add_argument("--batch", default="1,4", help="numbers of pictures at once")
    parser.add_argument("--positions", type=int, default=24)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out the compiled ways")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact = preset_model(options.preset, CPU, torch.float32)
    models = {"float32": exact, "int8": copy.deepcopy(exact).quantize("int8")}
    probe = Probe(CPU, torch.float32)
    rows = []
    for pictures in map(int, options.batch.split(",")):
        rows += measure(models, pictures, options.positions, options.compile, probe)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.preset} on {machine_name(CPU)}, one thread, torch {torch.__version__}, guidance 3\n")
    print(table(rows))


if __name__ == "__main__":
    main()
