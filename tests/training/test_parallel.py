"""The collective operations add up to what one process would have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vilau.training import parallel
from vilau.training.vision_tower import local_numbers


def test_one_process_needs_no_group() -> None:
    """Without torchrun every operation is the identity."""
    rows = torch.arange(6.0).reshape(3, 2)
    assert parallel.start() == (0, 1)
    assert parallel.gather_rows(rows) is rows
    assert torch.equal(parallel.sum_over_ranks(rows), rows)
    assert parallel.gather_objects("x") == ["x"]
    assert parallel.ranks_where(True) == [0]
    assert parallel.ranks_where(False) == []
    parallel.barrier()
    parallel.stop()


def test_shares_of_a_batch_are_the_batch_in_rank_order() -> None:
    """R10: the shares of 1, 2 and 4 processes, put together in rank order, are the same sample numbers."""
    for world in (1, 2, 4):
        shares = [list(local_numbers(3, 8, rank, world)) for rank in range(world)]
        assert [number for share in shares for number in share] == list(range(24, 32))
        assert {len(share) for share in shares} == {8 // world}


def _member(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    own = torch.full((1, 2), rank + 1.0, requires_grad=True)
    (parallel.gather_rows(own).square() * (rank + 1)).sum().backward()
    facts: dict[str, Any] = {
        "where": parallel.ranks_where(rank == 1),
        "any": [parallel.any_rank(rank == 1), parallel.any_rank(False)],
        "objects": parallel.gather_objects({"rank": rank}),
        "sum": parallel.sum_over_ranks(torch.tensor([1.0, float(rank)])).tolist(),
        "rows": parallel.gather_rows(torch.full((1, 2), float(rank))).tolist(),
    }
    facts["gradient"] = parallel.gather_objects(None if own.grad is None else own.grad.tolist())
    torch.save(facts, folder / f"facts-{rank}.pt")
    parallel.stop()


def test_two_processes_agree() -> None:
    """Every process learns the same facts."""
    folder = Path(tempfile.mkdtemp())
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # the parent's other threads did not come along
                _member(rank, folder)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    first, second = (torch.load(folder / f"facts-{rank}.pt") for rank in range(2))
    assert first == second
    assert first == {
        "where": [1],
        "any": [True, False],
        "objects": [{"rank": 0}, {"rank": 1}],
        "sum": [2.0, 1.0],
        "rows": [[0.0, 0.0], [1.0, 1.0]],
        "gradient": [[[6.0, 6.0]], [[12.0, 12.0]]],  # 2 * row * (1 + 2)
    }
