"""How many floating-point operations training takes and how many the hardware can do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# dense peaks in TFLOP/s by the makers' data sheets: bfloat16, float32; the first name that fits counts
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 80),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
}


def count_flops(work: Callable[[], object]) -> float:
    """Return the operations of matrix products, convolutions and attention in `work`, forward only or with backward.

    On tensors of the `meta` device nothing is computed and nothing takes memory.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def linear_flops(module: nn.Module) -> float:
    """Return the operations per position of all linear layers, forward and backward.

    Two per weight forward, two for the gradient of the input, two for the gradient of the weight if it is trained.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() * (6.0 if part.weight.requires_grad else 4.0) for part in layers)


def attention_flops(width: int, layers: int, pairs: float) -> float:
    """Return the operations of attention, forward and backward, for `pairs` of positions of which one sees the other.

    Scores and mixing take two operations per pair and channel each; the backward pass takes twice as many.
    """
    return 12.0 * width * layers * pairs


def peak_flops(device: torch.device, half: bool) -> float:
    """Return the operations per second that a device can do: by data sheet for a known GPU, measured on a CPU, or 0."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((peaks for part, peaks in GPU_PEAKS.items() if part in name), (0.0, 0.0))
        return peaks[0 if half else 1] * 1e12
    matrix = torch.ones(768, 768, dtype=torch.bfloat16 if half else torch.float32)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2.0 * 768**3 / min(times)
