"""One process or many: the few collective operations the engine needs, all of them no-ops on one process."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather as _gather_with_gradient


def start() -> tuple[int, int]:
    """Join the process group that torchrun describes; return (rank, world size), (0, 1) without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def stop() -> None:
    """Leave the process group if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum over all processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate ``(N, ...)`` of every process in rank order; gradients flow back to their owners."""
    return rows if world_size() == 1 else torch.cat(_gather_with_gradient(rows))


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes in one flat message; absent gradients count as zero.

    Every loss is already divided by its global count, so the sum is the gradient of the global batch, however many
    processes shared it.
    """
    if world_size() == 1:
        return
    chosen = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in chosen])
    dist.all_reduce(flat)
    offset = 0
    for p in chosen:
        p.grad = flat[offset : offset + p.numel()].view_as(p).clone()
        offset += p.numel()


def any_rank(flag: bool) -> bool:
    """Return whether any process raised the flag."""
    return bool(sum_over_ranks(torch.tensor(float(flag))) > 0)
