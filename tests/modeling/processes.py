"""Run a function in two processes that are joined by gloo."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_two_processes(member: Callable[[int], Any]) -> tuple[Any, Any]:
    """Return what ``member(rank)`` returned in each of two forked processes (tensors and plain values)."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(2):
            child = os.fork()
            if not child:
                _run(member, rank, folder)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


def _run(member: Callable[[int], Any], rank: int, folder: Path) -> None:
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's other threads did not come along: waiting for them never ends
        dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
        torch.save(member(rank), folder / f"{rank}.pt")
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
