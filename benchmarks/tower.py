"""How far the vision tower is from the machine's limit, and where a training step goes: ratios within one run.

    python benchmarks/tower.py [--sizes nano,midsize] [--threads N] [--repeat N] [--no-quantizer] [--json]
    python benchmarks/tower.py --out docs/results/tower-benchmark.md

README.md beside this file says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vilau.configuration import VisionTowerConfig
from vilau.evaluation.machine import Clock, machine_name, median, time_once
from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TowerStageConfig
from vilau.training.vision_tower import TowerBatch, TowerStage

TEXT_LENGTH = 64
SIZES: dict[str, dict[str, Any]] = {
    "nano": {  # the shipped model's tower
        "image_encoder_config": {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
        },
        "stem": "conv",
        "code_dim": 64,
        "depth": 4,
        "codebook_size": 1024,
        "decoder_channels": 32,
        "decoder_multipliers": [1, 2, 3, 4],
        "decoder_blocks": 1,
        "decoder_attention": [4],
        "decoder_latent_channels": 128,
    },
    "midsize": {  # 256 px, an encoder of SigLIP-base's sizes, the paper's decoder
        "image_encoder_config": {
            "image_size": 256,
            "patch_size": 16,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "depth": 4,
        "codebook_size": 16384,
        "decoder_channels": 128,
    },
}
BATCHES = {"nano": (64, 64), "midsize": (1, 1)}  # pictures per call of the tower, and per training step, on a CPU
GPU_BATCHES = {"nano": (256, 256), "midsize": (32, 16)}


@dataclass(frozen=True)
class Timed:
    """Medians over repetitions: seconds, and the share of the matrix rate measured beside each repetition."""

    wall: float
    cpu: float
    floor_share_wall: float
    floor_share_cpu: float


class Machine:
    """One device: runs work, and measures its matrix rate beside every repetition."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        side = 8192 if device.type == "cuda" else 1024
        self.square = torch.rand(side, side, device=device)
        self.operations = 2.0 * side**3
        self.rates: list[Clock] = []

    def rate(self) -> Clock:
        """Return operations per second of a square float32 product, by both clocks, now."""
        spent = time_once(lambda: torch.mm(self.square, self.square), self.device)
        self.rates.append(Clock(self.operations / spent.wall, self.operations / max(spent.cpu, 1e-9)))
        return self.rates[-1]

    def measure(self, works: dict[str, Callable[[], object]], flops: dict[str, float], repeat: int) -> dict[str, Timed]:
        """Time each work `repeat` times in turn; counting its operations has run it once already."""
        self.rate()
        spent: dict[str, list[tuple[Clock, Clock]]] = {name: [] for name in works}
        for _ in range(repeat):
            for name, work in works.items():
                before = self.rate()
                taken = time_once(work, self.device)
                after = self.rate()
                mean = Clock((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2)
                spent[name].append((taken, mean))
        return {
            name: Timed(
                statistics.median(taken.wall for taken, _ in pairs),
                statistics.median(taken.cpu for taken, _ in pairs),
                statistics.median(flops[name] / rate.wall / taken.wall for taken, rate in pairs),
                statistics.median(flops[name] / rate.cpu / max(taken.cpu, 1e-9) for taken, rate in pairs),
            )
            for name, pairs in spent.items()
        }


def build_tower(size: str, device: torch.device) -> VisionTower:
    """Return a tower of random weights with a text encoder of the image encoder's sizes."""
    image = SIZES[size]["image_encoder_config"]
    text = {name: image[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    text |= {"num_hidden_layers": image["num_hidden_layers"], "max_position_embeddings": TEXT_LENGTH}
    torch.manual_seed(0)
    config = VisionTowerConfig(**SIZES[size], text_encoder_config=text, restart_unused_codes=False)
    tower = VisionTower(config).to(device)  # type: ignore[arg-type]
    tower.quantizer.initialised.fill_(1)  # k-means happens once in a run and is no part of a step
    return tower


class Counter(TorchDispatchMode):
    """Adds up operations by the library's formulas.

    Its own counter follows modules with hooks, which the gradient of the adaptive weight does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(work: Callable[[], object]) -> float:
    """Return the operations of matrix products, convolutions and attention, backward included where it runs."""
    counter = Counter()
    with counter, sdpa_kernel(SDPBackend.MATH):  # of the CPU's fused attention the library knows no formula
        work()
    return counter.total


def use(machine: Machine, size: str, repeat: int) -> dict[str, Any]:
    """Measure encoding and decoding."""
    batch = _batches(machine)[size][0]
    tower = build_tower(size, machine.device).eval()
    side = tower.config.image_size
    pixels = torch.rand(batch, 3, side, side, device=machine.device) * 2 - 1
    codes = tower.encode(pixels)
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: tower.encode(pixels),
        "decode": lambda: tower.decode(codes),
    }
    with torch.no_grad():
        flops = {name: operations(work) for name, work in works.items()}
    found = machine.measure(works, flops, repeat)
    return {
        name: {"pictures": batch, "gflop_per_picture": flops[name] / batch / 1e9, **asdict(timed)}
        | {"images_per_s_wall": batch / timed.wall, "images_per_s_cpu": batch / max(timed.cpu, 1e-9)}
        for name, timed in found.items()
    }


class _NoTokenizer:
    """Stands where a stage wants a tokenizer: captions come as ids here."""


def step(machine: Machine, size: str, repeat: int) -> dict[str, Any]:
    """Measure a training step with all losses, and its parts, forward and backward each."""
    batch = _batches(machine)[size][1]
    tower = build_tower(size, machine.device)
    settings = TowerStageConfig(
        steps=1, batch_size=batch, perceptual="siglip", adversarial_weight=0.75, contrastive="sigmoid"
    )
    stage = TowerStage("vision_tower", settings, tower, [], _NoTokenizer(), TEXT_LENGTH)
    optimizers = stage.build_optimizers()
    stage.train_mode()
    side = tower.config.image_size
    data = TowerBatch(
        torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8),
        torch.randint(3, 1000, (batch, TEXT_LENGTH)),
        torch.arange(batch),
        torch.arange(batch),
    )
    pixels = torch.rand(batch, 3, side, side, device=machine.device) * 2 - 1
    with torch.no_grad():
        features = tower.features(pixels)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: tower.features(pixels).sum().backward(),
        "quantise": lambda: _quantise(tower, features),
        "decode": lambda: tower.decode_features(features.clone().requires_grad_()).sum().backward(),
        "optimizer": lambda: [optimizer.step() for optimizer in optimizers],
        "whole step": lambda: _train(stage, data, optimizers),
    }
    order = ["whole step", *(name for name in parts if name != "whole step")]  # the optimizer needs its gradients
    flops = {name: operations(parts[name]) for name in order}
    found = machine.measure(parts, flops, repeat)
    whole = found["whole step"]
    shares = {
        name: timed.cpu / whole.cpu if _by_cpu(machine) else timed.wall / whole.wall for name, timed in found.items()
    }
    rest = 1 - sum(share for name, share in shares.items() if name != "whole step")
    return {
        "pictures": batch,
        "parts": {name: asdict(timed) | {"gflop": flops[name] / 1e9} for name, timed in found.items()},
        "shares": shares | {"losses and the rest": rest},
        "images_per_s_wall": batch / whole.wall,
    }


def _quantise(tower: VisionTower, features: torch.Tensor) -> None:
    out = tower.quantizer(features.clone().requires_grad_())
    (out.commitment + out.z_q.sum()).backward()


def _train(stage: TowerStage, data: TowerBatch, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    stage.compute(data, 0).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _batches(machine: Machine) -> dict[str, tuple[int, int]]:
    return BATCHES if machine.device.type == "cpu" else GPU_BATCHES


def _by_cpu(machine: Machine) -> bool:
    """On a CPU that others use too, processor time is what the work itself took."""
    return machine.device.type == "cpu"


def quantizer(threads: int, repeat: int, vectors: int) -> dict[str, Any]:
    """Measure the quantizer at K = 16384, D = 16 beside the plain forms, each in a process of its own."""
    from quantizer import Problem, measure_quantizer

    problem = Problem(threads=threads, vectors=vectors)
    costs = measure_quantizer(problem, repeat=repeat)
    pairs = {"search against the whole table of distances": ("tiled", "expanded")}
    pairs |= {
        "search against torch.cdist": ("tiled", "cdist"),
        "training step against one-hot": ("step", "one_hot_step"),
    }
    ratios = {
        name: {"time": costs[theirs].cpu / costs[ours].cpu, "memory": costs[theirs].memory / max(1, costs[ours].memory)}
        for name, (ours, theirs) in pairs.items()
    }
    return {
        "problem": asdict(problem),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "times_less": ratios,
        "floor_share": costs["product"].cpu / costs["tiled"].cpu,
    }


def run(sizes: list[str], device: str | None, repeat: int, vectors: int) -> dict[str, Any]:
    """Measure everything asked for and return plain values."""
    machine = Machine(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    measured = {size: {"use": use(machine, size, repeat), "step": step(machine, size, repeat)} for size in sizes}
    clock = "cpu" if _by_cpu(machine) else "wall"
    return {
        "machine": {
            "device": machine_name(machine.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "clock": clock,
            "matrix_gflop_per_s": getattr(median(machine.rates), clock) / 1e9,
            "repetitions": repeat,
        },
        "sizes": measured,
        "quantizer": quantizer(torch.get_num_threads(), 1, vectors) if vectors and _by_cpu(machine) else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = result["machine"]
    clock = machine["clock"]
    lines = [
        f"{machine['threads']} threads of {machine['device']}, torch {machine['torch']}, float32; medians of "
        f"{machine['repetitions']} repetitions by {clock} time. Matrix products ran at "
        f"{machine['matrix_gflop_per_s']:.0f} GFLOP/s between them; a share of the floor is the time that the counted "
        "operations would take at that rate, over the time that they took.",
        "",
        "| tower | | GFLOP a picture | pictures/s | share of the floor |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for size, found in result["sizes"].items():
        for name, row in found["use"].items():
            lines.append(
                f"| {size} | {name} | {row['gflop_per_picture']:.3g} | {row[f'images_per_s_{clock}']:.3g} | "
                f"{row[f'floor_share_{clock}']:.0%} |"
            )
    lines += ["", "A training step with contrastive, pixel, perceptual (`siglip`) and adversarial loss:", ""]
    names = ["encode", "quantise", "decode", "losses and the rest", "optimizer"]
    lines += ["| tower | pictures | " + " | ".join(names) + " | whole step's share of the floor |"]
    lines += ["| --- | ---: | " + " | ".join("---:" for _ in names) + " | ---: |"]
    for size, found in result["sizes"].items():
        row = found["step"]
        cells = " | ".join(f"{row['shares'][name]:.0%}" for name in names)
        whole = row["parts"]["whole step"][f"floor_share_{clock}"]
        lines.append(f"| {size} | {row['pictures']} | {cells} | {whole:.0%} |")
    if result["quantizer"]:
        found = result["quantizer"]
        problem = found["problem"]
        lines += [
            "",
            f"The quantizer at K = {problem['size']}, D = {problem['depth']}, {problem['vectors']} vectors of width "
            f"{problem['width']}; the search takes {1 / found['floor_share']:.2f} times its matrix products alone:",
            "",
            "| | times faster | times less memory |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {row['time']:.2f} | {row['memory']:.1f} |" for name, row in found["times_less"].items()),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line, measure, print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="nano,midsize", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--device", help="cpu, cuda, ...; absent: the GPU if there is one")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: processor time is then honest)")
    parser.add_argument("--repeat", type=int, default=5, help="timed repetitions of each item (default 5)")
    parser.add_argument("--vectors", type=int, default=2916, help="of the quantizer's measurement; 0 leaves it out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--out", type=Path, help="write a page, and the JSON beside it")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if set(sizes) - set(SIZES) or min(options.repeat, options.threads) < 1 or options.vectors < 0:
        parser.error(f"sizes are of {', '.join(SIZES)}; numbers must be at least 1, vectors at least 0")
    torch.set_num_threads(options.threads)
    result = run(sizes, options.device, options.repeat, options.vectors)
    if options.out:
        head = (
            "# The vision tower's speed\n\nWritten by `python benchmarks/tower.py --out FILE`; not edited by hand.\n\n"
        )
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.out.write_text(head + markdown(result), encoding="utf-8")
    print(json.dumps(result, indent=1) if options.json else markdown(result))


if __name__ == "__main__":
    main()
