"""What a machine can do: its clocks, memory, reading speed and matrix rate, measured beside the work."""

from __future__ import annotations

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """Wall time and processor time of all threads, in seconds; also the difference of two readings."""

    wall: float
    cpu: float

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.wall + other.wall, self.cpu + other.cpu)


def now(device: torch.device) -> Clock:
    """Read both clocks when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Clock(time.perf_counter(), time.process_time())


def median(times: list[Clock]) -> Clock:
    """Return the medians of both clocks."""
    return Clock(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


def time_once(work: Callable[[], Any], device: torch.device) -> Clock:
    """Return the time of one call of ``work``."""
    start = now(device)
    work()
    return now(device) - start


def measure(work: Callable[[], Any], repeat: int, device: torch.device) -> Clock:
    """Return the median time of ``work``, after one call that is not counted."""
    work()
    return median([time_once(work, device) for _ in range(repeat)])


class Probe:
    """The machine's limits: bytes read per second and operations per second, from repeated short measurements.

    On a CPU the bandwidth is that of a float32 matrix times a vector, on a GPU that of a large copy, bytes read plus
    written. The matrix rate is that of a square product in the model's dtype.

    Args:
        megabytes: size of the matrix; over 1,000 so that no cache holds it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, megabytes: int = 1100) -> None:
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
        self.clear()

    @property
    def host_bytes(self) -> int:
        """Memory that the probe itself takes in the process."""
        return 0 if self.copy is not None else self.large.numel() * 4

    def clear(self) -> None:
        """Forget what was measured so far."""
        self.reads.clear()
        self.products.clear()

    def sample(self) -> None:
        """Measure both limits once."""
        start = now(self.device)
        if self.copy is None:
            torch.mv(self.large, self.vector)
        else:
            self.copy.copy_(self.large)
        middle = now(self.device)
        torch.mm(self.square, self.square)
        self.reads.append(middle - start)
        self.products.append(now(self.device) - middle)

    def limits(self, clock: str) -> tuple[float, float]:
        """Return bytes per second and operations per second by the `wall` or the `cpu` clock, medians."""
        size = self.large.numel() * 4 * (1 if self.copy is None else 2)
        return size / getattr(median(self.reads), clock), self.operations / getattr(median(self.products), clock)


def machine_name(device: torch.device) -> str:
    """Return the processor's name, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model')} stepping {facts.get('stepping')})"
    return name


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new count of the largest memory, where the system can; else it goes on from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the largest memory of this process (on a GPU: of its allocator) since the last reset, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
