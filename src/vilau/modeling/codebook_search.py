"""Nearest code vectors, k-means and rows shared by all processes: the arithmetic under every codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

_CPU_TILE = (2048, 1024)  # points and codes compared at once: what a CPU's caches hold
_GPU_ENTRIES = 1 << 26  # distances computed at once elsewhere


def nearest_codes(points: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the index ``(N,)`` of the row of ``book`` (K, C) nearest to each of ``points`` (N, C), float32.

    ``|p - e|^2`` is least where ``|e|^2 / 2 - p e`` is, which is one matrix product. It is computed tile by tile, so
    that memory grows neither with N nor with K, and never in half precision, whatever autocast says. Among codes that
    differ in their distance by rounding only, any may be found.
    """
    rows, columns = _tile(points, len(book))
    with torch.autocast(points.device.type, enabled=False):
        half_norms = _half_norms(book)
        return torch.cat([_nearest(part, book, half_norms, columns) for part in points.split(rows)])


def _half_norms(book: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.square().sum(1) for part in book.split(_CPU_TILE[1])]) / 2


def _tile(points: torch.Tensor, codes: int) -> tuple[int, int]:
    return _CPU_TILE if points.device.type == "cpu" else (max(1, _GPU_ENTRIES // codes), codes)


def _nearest(points: torch.Tensor, book: torch.Tensor, half_norms: torch.Tensor, columns: int) -> torch.Tensor:
    least, nearest = torch.addmm(half_norms[:columns], points, book[:columns].t(), alpha=-1).min(1)
    for start in range(columns, len(book), columns):
        part = slice(start, start + columns)
        distance, index = torch.addmm(half_norms[part], points, book[part].t(), alpha=-1).min(1)
        nearest = torch.where(distance < least, index + start, nearest)
        least = torch.minimum(distance, least)
    return nearest


def neighbours(points: torch.Tensor, book: torch.Tensor, number: int) -> torch.Tensor:
    """Return the indices ``(N, number)`` of the rows of ``book`` (K, C) nearest to ``points`` (N, C), nearest first."""
    with torch.autocast(points.device.type, enabled=False):
        half_norms, parts = _half_norms(book), points.split(_CPU_TILE[1])
        distances = (torch.addmm(half_norms, part, book.t(), alpha=-1) for part in parts)
        return torch.cat([distance.topk(number, largest=False).indices for distance in distances])


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


def pick_rows(
    number: int,
    device: torch.device,
    choose: Callable[[int], torch.Tensor],
    read: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return chosen rows ``(M, C)`` out of those of all processes, the same ones on each of them.

    Rows are numbered through in rank order, as they stand in the batch of a single process; processes may have
    different numbers of them. Only what was chosen is read, and travels.

    Args:
        number: of the rows of this process.
        device: of the rows.
        choose: given the number of all rows, the numbers ``(M,)`` to return; what the first process says counts.
        read: the rows ``(m, C)`` of this process with the numbers ``(m,)``, counted from 0.
    """
    if not many_processes():
        return read(choose(number).to(device))
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    counts[dist.get_rank()] = number
    dist.all_reduce(counts)
    chosen = choose(int(counts.sum())).to(device)
    dist.broadcast(chosen, 0)
    own = chosen - counts[: dist.get_rank()].sum()
    here = (own >= 0) & (own < number)
    mine = read(own[here])
    picked = mine.new_zeros((len(chosen), *mine.shape[1:]))
    picked[here] = mine
    dist.all_reduce(picked)  # every row has one owner: nothing is rounded
    return picked
