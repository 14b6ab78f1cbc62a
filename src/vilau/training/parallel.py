"""One process or many: the few collective operations the engine needs, all of them no-ops on one process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(minutes=30)  # the others wait while the first process draws samples or writes


def start() -> tuple[int, int]:
    """Join the process group that torchrun describes; return (rank, world size), (0, 1) without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, number, size = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # torchrun keeps one store over restarts on one machine: without a name of its own, a restarted worker
            # finds the addresses of dead ones there
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_PATIENCE)
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
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    """Every process's rows; what all processes want of a row adds up in its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()]


def any_rank(flag: bool) -> bool:
    """Return whether any process raised the flag."""
    return bool(sum_over_ranks(torch.tensor(float(flag))) > 0)


def ranks_where(flag: bool) -> list[int]:
    """Return the numbers of the processes that raised the flag, the same list everywhere."""
    flags = torch.zeros(world_size())
    flags[rank()] = float(flag)
    return sum_over_ranks(flags).nonzero().flatten().tolist()


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
