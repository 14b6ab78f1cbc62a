"""Generation against the machine's floor and against its alternatives: one command, tables and plots.

    python benchmarks/generation.py [--out FOLDER] [--positions N] [--threads N] [--quick]

Writes generation.json, generation-tables.md and generation-*.svg into the folder, this one if not told.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from torch import nn
from transformers import AutoModel

from vilau.cli.bench import table
from vilau.evaluation.generation_speed import (
    bench_batch,
    bench_request,
    bench_tower,
    preset_model,
    time_positions,
)
from vilau.evaluation.machine import Probe, machine_name
from vilau.generation.position import Networks, SlotLanguage, VisualState, VisualStep
from vilau.generation.prepared import PackedLinear, prepare, replaced
from vilau.generation.visual import begin
from vilau.modeling.depth_transformer import DepthTransformer

CPU = torch.device("cpu")
KERNELS = ("plain", "mkldnn")  # those that take any number of rows, as the alternatives need


class RecomputedDepth(VisualStep):
    """The depth loop as the published reference runs it: every step computes its whole prefix again."""

    def __init__(self, networks: Networks) -> None:
        super().__init__(networks)
        self.inputs: list[torch.Tensor] = []

    def depth_logits(self, x: torch.Tensor, depth: int, cache: Any) -> torch.Tensor:
        """Logits of the last step of the prefix, all of which goes through the blocks; the head sees the last alone."""
        network: DepthTransformer = self.networks.depth_transformer
        if depth == 0:
            self.inputs = []
        self.inputs.append(network.project_hidden(x) if depth == 0 else network.project_codes(x))
        states = torch.stack(self.inputs, 1) + network.position_embedding[: depth + 1]
        for block in network.blocks:
            states = block(states)
        return network.head(network.norm(states[:, -1]))


def depth_of(step: VisualStep, state: VisualState, hidden: torch.Tensor) -> None:
    """Run the depth loop of one position without the draws."""
    x = hidden
    for depth in range(step.networks.quantizer.depth):
        step.depth_logits(x, depth, state.depth_cache)
        x = torch.zeros(len(hidden), step.networks.quantizer.code_dim)


def alternating(works: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Return the median processor milliseconds of each work, all of them in turn so that noise meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeat + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def layers_for(model: Any, heads: int) -> int:
    """Return how many layers a language model with ``heads`` heads over the codes has for the weights of the model.

    The weights are those of the language model's body and the depth transformer with its head; embeddings and text
    head are left out on both sides. Less than one if the heads alone have more.
    """
    layers = model.language_model.base_model.layers
    layer, depth = (sum(p.numel() for p in part.parameters()) for part in (layers[0], model.depth_transformer))
    head = model.config.vision_config.codebook_size * model.config.text_config.hidden_size
    return len(layers) + round((depth - heads * head) / layer)


def laid_out(linear: nn.Linear, kernel: str, rows: int) -> nn.Module:
    """Return a layer with its weight in the layout of a kernel."""
    return linear if kernel == "plain" else PackedLinear(linear, kernel, rows)


def language_of(model: Any, layers: int, kernel: str, rows: int) -> Any:
    """Return a language model of this one's sizes with ``layers`` layers of random weights, laid out for rows."""
    config = copy.deepcopy(model.config.text_config)
    config.num_hidden_layers = layers
    torch.manual_seed(1)
    language = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    return replaced(language, lambda linear: laid_out(linear, kernel, rows))


def repeatable(language: SlotLanguage, hidden: torch.Tensor, steps: int, head: nn.Module) -> Callable[[], None]:
    """Return what runs so many steps of a language model, each with a head, and puts its cache back."""

    def work() -> None:
        for _ in range(steps):
            head(language.advance(hidden))
        language.cache.lengths -= steps
        language.filled -= steps

    return work


@torch.no_grad()
def alternatives(model: Any, pictures: int, kernel: str, repeat: int) -> dict[str, Any]:
    """Processor milliseconds of one position's language model step and depth loops, and of what could replace both.

    `cached`, `recomputed`: the depth transformer, beside `lm`, the step of the language model. The others are whole
    positions of models without one that have as many weights, which makes their language models larger.
    `flattened`: D steps, each with a head over the codes. `parallel`: one step and D heads side by side; None where
    the heads alone have more weights.
    """
    request = bench_request(model, pictures, 32, 3.0, 64)
    rows = len(request.prompts.rows)
    networks = prepare(model, rows, kernel)
    begun = begin(networks, request)
    state, hidden = begun.state, begun.hidden
    assert isinstance(begun.language, SlotLanguage)
    depth, codes = networks.quantizer.depth, networks.quantizer.codebook_size
    cached, recomputed = VisualStep(networks), RecomputedDepth(networks)
    works: dict[str, Callable[[], Any]] = {
        "lm": repeatable(begun.language, hidden, 1, nn.Identity()),
        "cached": lambda: depth_of(cached, state, hidden),
        "recomputed": lambda: depth_of(recomputed, state, hidden),
    }
    layers: dict[str, int] = {}
    for name, heads, steps in (("flattened", 1, depth), ("parallel", depth, 1)):
        layers[name] = layers_for(model, heads)
        if layers[name] > 0:
            head = laid_out(nn.Linear(hidden.shape[1], heads * codes), kernel, rows)
            language, _ = SlotLanguage.read(language_of(model, layers[name], kernel, rows), request.prompts, 64)
            works[name] = repeatable(language, hidden, steps, head)
    return dict.fromkeys(layers) | alternating(works, repeat) | {"layers": layers}


def alternatives_table(found: list[dict[str, Any]]) -> str:
    """Markdown of `alternatives`, with whole positions."""
    lines = [
        "| D | pictures | kernel | LM step | depth cached | depth recomputed | position cached | position recomputed "
        "| gain | flattened (layers) | parallel heads (layers) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        cached, again = row["lm"] + row["cached"], row["lm"] + row["recomputed"]
        others = [
            f"{row[name]:.0f} ({row['layers'][name]})" if row[name] is not None else ""
            for name in ("flattened", "parallel")
        ]
        times = (row["lm"], row["cached"], row["recomputed"], cached, again)
        cells = [row["depth"], row["pictures"], row["kernel"], *(f"{time:.0f}" for time in times)]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{again / cached:.2f}', *others]))} |")
    return "\n".join(lines)


def svg(title: str, across: str, points: dict[str, list[tuple[float, float]]]) -> str:
    """Return a small line plot of milliseconds against ``across``, both from zero."""
    width, height, left, bottom = 460, 280, 55, 45
    high_x = max(x for line in points.values() for x, _ in line)
    high_y = 1.1 * max(y for line in points.values() for _, y in line)
    colours = ("#1f6f8b", "#c8553d", "#5b8c5a", "#7a5c99")

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / high_x * (width - left - 20), height - bottom - y / high_y * (height - bottom - 35)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">{title}</text>',
        f'<text x="{width / 2:.0f}" y="{height - 8}">{across}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(0, share * high_y)
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share * high_y:.0f}</text>')
    for x in sorted({x for line in points.values() for x, _ in line}):
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{height - bottom + 15}" text-anchor="middle">{x:g}</text>')
    for number, (name, line) in enumerate(points.items()):
        colour = colours[number % len(colours)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in path.split()
        ]
        parts.append(f'<text x="{left + 10}" y="{40 + 14 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def growth(model: Any, contexts: list[int], positions: int) -> list[tuple[float, float]]:
    """Processor milliseconds of a position of one guided picture against the positions before it."""
    line = []
    for context in contexts:
        request = bench_request(model, 1, context, 3.0, positions + 4)
        step = VisualStep(prepare(model, len(request.prompts.rows), "mkldnn"))
        line.append((float(context), time_positions(step, request, positions, None).position.cpu * 1e3))
    return line


def run(positions: int, quick: bool) -> dict[str, Any]:
    """Measure everything and return plain values."""
    probe = Probe(CPU, torch.float32)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    plots: dict[str, Any] = {}
    for preset in ("midsize", "midsize-d16"):
        model = preset_model(preset, CPU, torch.float32)
        depth = model.config.vision_config.depth
        tower = {} if depth != 4 else bench_tower(model, probe)
        for pictures in (1, 4) if quick or depth != 4 else (1, 2, 4, 8, 16):
            for kernel in ("plain", None) if pictures in (1, 4) and depth == 4 else (None,):
                settings = {"positions": positions, "kernel": kernel}
                rows.append(bench_batch(model, preset, pictures, probe, **settings) | tower)  # type: ignore[arg-type]
                print(table(rows[-1:]).splitlines()[-1], flush=True)
        for pictures in (1, 4):
            for kernel in KERNELS:
                one = {"depth": depth, "pictures": pictures, "kernel": kernel}
                found.append(one | alternatives(model, pictures, kernel, max(3, positions // 4)))
                print(alternatives_table(found[-1:]).splitlines()[-1], flush=True)
        if depth == 4:
            plots["context"] = growth(model, [32, 512, 1024, 2048], max(3, positions // 4))
    return {
        "machine": machine_name(CPU),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
        "alternatives": found,
        "context": plots["context"],
    }


def write(result: dict[str, Any], out: Path) -> None:
    """Write tables and plots."""
    (out / "generation.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = result["rows"]
    text = [f"{result['machine']}, {result['threads']} thread, float32, torch {result['torch']}, guidance 3.", ""]
    for preset in ("midsize", "midsize-d16"):
        text += [f"`{preset}`:", "", table([row for row in rows if row["preset"] == preset]), ""]
    text += ["The depth transformer and what could stand in its place:", "", alternatives_table(result["alternatives"])]
    (out / "generation-tables.md").write_text("\n".join(text) + "\n")
    own = [row for row in rows if row["preset"] == "midsize" and row["kernel"] != "plain"] or rows
    batch = {
        "measured": [(row["batch"], row["cpu_ms_per_position"]) for row in own],
        "floor": [(row["batch"], row["floor_ms_per_position"]) for row in own],
    }
    (out / "generation-batch.svg").write_text(
        svg("ms of a position, all pictures", "pictures at once, guidance 3", batch)
    )
    context = {"1 picture": [tuple(point) for point in result["context"]]}
    (out / "generation-positions.svg").write_text(svg("ms of a position", "positions before it", context))
    depth: dict[str, list[tuple[float, float]]] = {}
    for row in result["alternatives"]:
        if row["pictures"] == 1 and row["kernel"] == "plain":
            for name, value in (
                ("depth transformer, cached", row["lm"] + row["cached"]),
                ("depth transformer, recomputed", row["lm"] + row["recomputed"]),
                ("flattened sequence, as many weights", row["flattened"]),
                ("parallel heads, as many weights", row["parallel"]),
            ):
                if value is not None:
                    depth.setdefault(name, []).append((row["depth"], value))
    (out / "generation-depth.svg").write_text(svg("ms of a position, 1 picture", "residual depth D", depth))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write(run(options.positions, options.quick), options.out)


if __name__ == "__main__":
    main()
