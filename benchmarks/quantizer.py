"""What the search for codes and a training step of the quantizer cost, beside the plain forms: time and memory.

    python benchmarks/quantizer.py [--size K] [--depth D] [--vectors N] [--width C] [--threads T] [--repeat R] [--json]

Every way of computing runs in a process of its own, in turn, on the same random features and codebook. Memory is what
the work adds to the process at its peak, on top of features and quantizer. README.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEARCHES = ("product", "tiled", "expanded", "cdist")
STEPS = ("step", "one_hot_step")


@dataclass(frozen=True)
class Problem:
    """`vectors` N features of `width` C get `depth` D codes each from one codebook of `size` K; `threads` compute."""

    size: int = 16384
    depth: int = 16
    vectors: int = 4 * 729
    width: int = 1152
    threads: int = 1


@dataclass(frozen=True)
class Cost:
    """Median `wall` and `cpu` seconds of one way of computing, and the largest `memory` in bytes that it added."""

    wall: float
    cpu: float
    memory: int


def measure_quantizer(
    problem: Problem = Problem(), ways: tuple[str, ...] = (*SEARCHES, *STEPS), repeat: int = 1
) -> dict[str, Cost]:
    """Return the cost of each way of computing.

    Ways:
        product: the D matrix products of the search alone, the floor of its time.
        tiled: the product's search, `ResidualQuantizer.encode`.
        expanded: ``|a|^2 - 2 a b + |b|^2`` for all vectors and codes at once.
        cdist: ``torch.cdist``.
        step: a training step of the quantizer, statistics and gradient included.
        one_hot_step: the same with whole distances, one-hot statistics and all partial sums kept.
    """
    found: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way in ways:
            found[way].append(_in_own_process(problem, way))
    return {
        way: Cost(
            statistics.median(cost.wall for cost in costs),
            statistics.median(cost.cpu for cost in costs),
            max(cost.memory for cost in costs),
        )
        for way, costs in found.items()
    }


def _in_own_process(problem: Problem, way: str) -> Cost:
    source = str(Path(__file__).resolve().parent.parent / "src")
    known = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(problem.threads)}
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        *(f"--{name}={value}" for name, value in asdict(problem).items()),
    ]
    done = subprocess.run(
        command, env=os.environ | known | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(problem: Problem, way: str) -> Cost:
    import torch

    from vilau.evaluation.machine import peak_memory, reset_peak_memory, time_once
    from vilau.modeling.quantizer import ResidualQuantizer

    cpu = torch.device("cpu")
    torch.set_num_threads(problem.threads)
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(problem.size, problem.width, problem.depth)
    quantizer.initialised.fill_(1)
    z_e = torch.randn(problem.vectors, problem.width) * problem.width**-0.5
    work = _works(quantizer, z_e)[way]
    small = ResidualQuantizer(2048, problem.width, 1)
    small.initialised.fill_(1)
    _works(small, z_e[:512].clone())[way]()  # what the libraries load and set up at their first use
    reset_peak_memory(cpu)
    before = peak_memory(cpu)  # what the process holds now, as its peak was just set back
    spent = time_once(work, cpu)
    return Cost(spent.wall, spent.cpu, max(0, peak_memory(cpu) - before))


def _works(quantizer: Any, z_e: Any) -> dict[str, Callable[[], object]]:
    import torch
    from torch.nn import functional as F

    from vilau.modeling import codebook_search

    book = quantizer.codebook[0]

    def product() -> None:
        rows, columns = codebook_search._CPU_TILE
        for _ in range(quantizer.depth):
            for part in z_e.split(rows):
                for codes in book.split(columns):
                    part @ codes.t()

    def search(nearest: Callable[[Any], Any]) -> Any:
        residual, codes = z_e, []
        for _ in range(quantizer.depth):
            codes.append(nearest(residual))
            residual = residual - book[codes[-1]]
        return torch.stack(codes, 1)

    def expanded(points: Any) -> Any:
        return (points.square().sum(1, keepdim=True) - 2 * points @ book.t() + book.square().sum(1)).argmin(1)

    def step() -> None:
        features = z_e.clone().requires_grad_()
        out = quantizer.train()(features)
        (out.commitment + out.z_q.sum()).backward()

    def one_hot_step() -> None:
        features = z_e.clone().requires_grad_()
        codes = search(expanded)
        partial = F.embedding(codes, book).cumsum(1)
        commitment = (features.unsqueeze(1) - partial).square().mean()
        z_q = features + (partial[:, -1] - features).detach()
        flat = features.detach().unsqueeze(1)
        asked = torch.cat([flat, flat - partial[:, :-1]], 1)
        for depth in range(quantizer.depth):
            one_hot = F.one_hot(codes[:, depth], len(book)).to(book.dtype)
            quantizer.ema_count[0].lerp_(one_hot.sum(0), 0.01)
            quantizer.ema_sum[0].lerp_(one_hot.t() @ asked[:, depth], 0.01)
        quantizer.codebook.copy_(quantizer.ema_sum / quantizer.ema_count.unsqueeze(-1))
        (commitment + z_q.sum()).backward()

    return {
        "product": product,
        "tiled": lambda: quantizer.encode(z_e),
        "expanded": lambda: search(expanded),
        "cdist": lambda: search(lambda points: torch.cdist(points, book).argmin(1)),
        "step": step,
        "one_hot_step": one_hot_step,
    }


def _table(problem: Problem, costs: dict[str, Cost]) -> str:
    lines = [
        f"K {problem.size}, D {problem.depth}, {problem.vectors} vectors of width {problem.width}, "
        f"{problem.threads} thread{'s' * (problem.threads > 1)}",
        f"{'':14}{'wall s':>9}{'cpu s':>9}{'memory MB':>11}{'cpu ratio':>11}{'memory ratio':>14}",
    ]
    for way, cost in costs.items():
        own = costs.get("step" if way in STEPS else "tiled", cost)
        memory = cost.memory / max(own.memory, 1)
        lines.append(
            f"{way:14}{cost.wall:9.2f}{cost.cpu:9.2f}{cost.memory / 1e6:11.1f}{cost.cpu / own.cpu:11.2f}{memory:14.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Problem()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=(*SEARCHES, *STEPS), help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    way, repeat, as_json = given.pop("way"), given.pop("repeat"), given.pop("json")
    problem = Problem(**given)
    if way:
        print(json.dumps(asdict(_measure_here(problem, way))))
        return
    costs = measure_quantizer(problem, repeat=repeat)
    figures = {"problem": asdict(problem), "costs": {name: asdict(cost) for name, cost in costs.items()}}
    print(json.dumps(figures, indent=1) if as_json else _table(problem, costs))


if __name__ == "__main__":
    main()
