"""How fast a model is, and how far from the limit of this machine: one command, one run, one table.

    python benchmarks/nano.py [MODEL] [--threads N] [--repeat N] [--json]

README.md beside this file says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from PIL import Image

import vilau

PROMPT = "a red apple on a blue background"
QUESTION = "what is this?"


@dataclass(frozen=True)
class Clock:
    """Wall time and processor time of all threads, in seconds; also the difference of two readings."""

    wall: float
    cpu: float

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)


def now(device: torch.device) -> Clock:
    """Read both clocks when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Clock(time.perf_counter(), time.process_time())


def measure(work: Callable[[], Any], repeat: int, device: torch.device) -> Clock:
    """Return the median time of `work`, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        start = now(device)
        work()
        times.append(now(device) - start)
    return Clock(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


class Probe:
    """The machine's limits: bytes read per second and operations per second, from repeated short measurements.

    On a CPU the bandwidth is that of a float32 matrix of over 1 GB times a vector; on a GPU that of a large copy, bytes
    read plus written. The matrix rate is that of a square product in the model's dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, megabytes: int) -> None:
        self.device = device
        side = int((megabytes * 2**20 / 4) ** 0.5)
        self.large = torch.ones(side, side, device=device)
        self.vector = torch.ones(side, device=device)
        self.copy = torch.empty_like(self.large) if device.type == "cuda" else None
        square = 8192 if device.type == "cuda" else 768
        self.square = torch.rand(square, square, device=device, dtype=dtype)
        self.operations = 2 * square**3
        self.reads: list[Clock] = []
        self.products: list[Clock] = []
        self.sample()
        self.reads.clear(), self.products.clear()

    def sample(self) -> None:
        """Measure both limits once."""
        start = now(self.device)
        if self.copy is None:
            torch.mv(self.large, self.vector)
        else:
            self.copy.copy_(self.large)
        middle = now(self.device)
        torch.mm(self.square, self.square)
        end = now(self.device)
        self.reads.append(middle - start)
        self.products.append(end - middle)

    def limits(self, clock: str) -> tuple[float, float]:
        """Return bytes per second and operations per second by one of the clocks, medians."""
        size = self.large.numel() * 4 * (1 if self.copy is None else 2)
        read = statistics.median(getattr(c, clock) for c in self.reads)
        product = statistics.median(getattr(c, clock) for c in self.products)
        return size / read, self.operations / product


def work_per_position(model: Any, rows: int, length: float) -> tuple[float, float]:
    """Return bytes read and operations of one position of `rows` rows at a mean context `length`.

    Language model body and D steps of the depth transformer with its head; no embedding table, no text head.
    """
    config, depth_model = model.config.text_config, model.depth_transformer
    tables = {id(p) for p in model.get_input_embeddings().parameters()}
    body = [p for p in model.language_model.base_model.parameters() if id(p) not in tables]
    steps = model.config.vision_config.depth
    inner = [p for part in (depth_model.blocks, depth_model.norm, depth_model.head) for p in part.parameters()]
    weights = sum(p.numel() for p in body) + steps * sum(p.numel() for p in inner)
    weights += sum(p.numel() for p in depth_model.project_hidden.parameters())
    weights += (steps - 1) * sum(p.numel() for p in depth_model.project_codes.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * length * rows
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * length * rows
    size = body[0].element_size()
    return (weights + cache) * size, 2 * weights * rows + attention


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
    size, operations = work_per_position(pipe.model, pictures * (2 if guided else 1), length)
    out: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        median = statistics.median(getattr(c, clock) for c in spent)
        reading, computing = probe.limits(clock)
        floor = max(size / reading, operations / computing)
        out |= {f"{clock}_ms": median * 1e3, f"{clock}_floor_ms": floor * 1e3, f"{clock}_floor_share": floor / median}
        out[f"prefill_{clock}_ms"] = max(0.0, statistics.median(getattr(c, clock) for c in first) - median) * 1e3
    return out | {"megabytes_read": size / 1e6, "megaflop": operations / 1e6}


def peak_memory(device: torch.device) -> float:
    """Return the largest memory of this process so far (of the GPU if there is one), in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


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
    memory = peak_memory(target)  # before the probe takes memory of its own
    probe = Probe(target, network.dtype, megabytes)
    per_position = {f"batch_{n}": positions(pipe, n, probe, repeat) for n in (1, 4)}
    reading, computing = probe.limits("wall")
    return {
        "model": str(model or "shipped"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "machine": {
            "device": torch.cuda.get_device_name(target) if target.type == "cuda" else platform.processor() or "cpu",
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
