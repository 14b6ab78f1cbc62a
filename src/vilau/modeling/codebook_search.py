"""Nearest code vectors, k-means and rows shared by all processes: the arithmetic under every codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

_CHUNK_ENTRIES = 1 << 26  # distances computed at once; bounds the memory of the search


def nearest_codes(points: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the index ``(N,)`` of the row of ``book`` (K, C) nearest to each of ``points`` (N, C), float32.

    ``|p - e|^2`` is least where ``|e|^2 / 2 - p e`` is, which is one matrix product. It is computed for some points at
    a time, so that memory does not grow with N, and never in half precision, whatever autocast says.
    """
    with torch.autocast(points.device.type, enabled=False):
        half_norms, rows = book.square().sum(1) / 2, max(1, _CHUNK_ENTRIES // len(book))
        parts = points.split(rows)
        return torch.cat([torch.addmm(half_norms, part, book.t(), alpha=-1).argmin(1) for part in parts])


def neighbours(points: torch.Tensor, book: torch.Tensor, number: int) -> torch.Tensor:
    """Return the indices ``(N, number)`` of the rows of ``book`` (K, C) nearest to ``points`` (N, C), nearest first."""
    with torch.autocast(points.device.type, enabled=False):
        half_norms, rows = book.square().sum(1) / 2, max(1, _CHUNK_ENTRIES // len(book))
        return torch.cat(
            [
                torch.addmm(half_norms, part, book.t(), alpha=-1).topk(number, largest=False).indices
                for part in points.split(rows)
            ]
        )


def k_means(
    points: torch.Tensor, k: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``k`` centres (k, C) of ``points`` (N, C) and the centre of each point (N,).

    It starts at random points, and stays there with no iterations; empty centres restart at random points.
    """
    if len(points) >= k:
        start = torch.randperm(len(points), generator=generator)[:k]
    else:
        start = torch.randint(len(points), (k,), generator=generator)
    centres = points[start.to(points.device)].clone()
    for _ in range(iterations):
        assigned = nearest_codes(points, centres)
        count = torch.zeros(k, device=points.device).index_add_(0, assigned, torch.ones_like(points[:, 0]))
        total = torch.zeros_like(centres).index_add_(0, assigned, points)
        empty = (count == 0).nonzero().squeeze(1)
        centres = total / count.clamp_min(1).unsqueeze(1)
        if len(empty):
            pick = torch.randint(len(points), (len(empty),), generator=generator).to(points.device)
            centres[empty] = points[pick]
    return centres, nearest_codes(points, centres)


def many_processes() -> bool:
    """Return whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(*tensors: torch.Tensor) -> None:
    """Add up tensors over all processes, in place."""
    if many_processes():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_first(*tensors: torch.Tensor) -> None:
    """Overwrite tensors with those of the first process, in place."""
    if many_processes():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def total_rows(rows: torch.Tensor) -> int:
    """Return how many rows all processes have together."""
    count = torch.tensor([len(rows)], device=rows.device)
    sum_over_processes(count)
    return int(count)


def pick_rows(rows: torch.Tensor, choose: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return chosen rows ``(M, C)`` out of the ``rows`` (N, C) of all processes, the same ones on each of them.

    Rows are numbered through in rank order, as they stand in the batch of a single process; processes may have
    different numbers of them. Only what was chosen travels.

    Args:
        rows: ``(N, C)`` of this process.
        choose: given the number of all rows, the numbers ``(M,)`` to return; what the first process says counts.
    """
    if not many_processes():
        return rows[choose(len(rows)).to(rows.device)]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    chosen = choose(int(counts.sum())).to(rows.device)
    dist.broadcast(chosen, 0)
    own = chosen - counts[: dist.get_rank()].sum()
    here = (own >= 0) & (own < len(rows))
    picked = rows.new_zeros((len(chosen), *rows.shape[1:]))
    picked[here] = rows[own[here]]
    dist.all_reduce(picked)  # every row has one owner: nothing is rounded
    return picked
