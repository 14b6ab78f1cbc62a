"""Nearest codes, k-means, and rows that several processes pick together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.processes import in_two_processes
from vilau.modeling import codebook_search
from vilau.modeling.codebook_search import k_means, nearest_codes, neighbours, pick_rows


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)
@given(
    number=st.integers(0, 40),
    codes=st.integers(1, 50),
    width=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_every_tile_gives_the_nearest(number: int, codes: int, width: int, tile: tuple[int, int], seed: int) -> None:
    """The tiled search finds, for any sizes and tiles, a code at the least distance that double precision finds."""
    points = torch.randn(number, width, generator=generator(seed))
    book = torch.randn(codes, width, generator=generator(seed + 1))
    original, codebook_search._CPU_TILE = codebook_search._CPU_TILE, tile
    try:
        found = nearest_codes(points, book)
    finally:
        codebook_search._CPU_TILE = original
    distances = (points.double().unsqueeze(1) - book.double()).square().sum(-1)
    assert found.shape == (number,) and found.dtype == torch.int64
    own = distances.gather(1, found.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(own, distances.amin(1), rtol=1e-5, atol=1e-5)


def test_autocast_does_not_change_the_search() -> None:
    """Products in bfloat16 would find other codes."""
    points, book = torch.randn(300, 8, generator=generator()), torch.randn(200, 8, generator=generator(1))
    exact, near = nearest_codes(points, book), neighbours(points, book, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(points, book), exact)
        assert torch.equal(neighbours(points, book, 3), near)
    assert torch.equal(near[:, 0], exact)
    assert torch.equal(near, torch.cdist(points.double(), book.double()).topk(3, largest=False).indices)


def test_k_means_finds_what_lies_apart() -> None:
    """Four heaps far from each other end as four centres at their means."""
    middles = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    points = middles.repeat_interleave(25, 0) + torch.randn(100, 2, generator=generator())
    for seed in range(5):
        centres, assigned = k_means(points, 4, 20, generator(seed))
        means = torch.stack([points[assigned == k].mean(0) for k in assigned.unique()])
        assert torch.equal(centres[assigned.unique()].round(), means.round())
    start, _ = k_means(points, 4, 0, generator())
    assert all((row == points).all(1).any() for row in start)  # without iterations: points as they are


def _pick(rank: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(10.0).reshape(5, 2)
    mine = rows[:2] if rank == 0 else rows[2:]
    torch.manual_seed(rank)  # processes need not agree on random numbers
    picked = pick_rows(len(mine), mine.device, lambda n: torch.randint(n, (7,)), lambda numbers: mine[numbers])
    ordered = pick_rows(len(mine), mine.device, torch.arange, lambda numbers: mine[numbers])
    return {"picked": picked, "ordered": ordered}


def test_processes_pick_the_same_rows() -> None:
    """Rows are numbered over all processes in rank order, in uneven shares too; the first one's choice counts."""
    rows = torch.arange(10.0).reshape(5, 2)
    first, second = in_two_processes(_pick)
    assert torch.equal(first["picked"], second["picked"])
    torch.manual_seed(0)
    assert torch.equal(first["picked"], rows[torch.randint(5, (7,))])
    assert torch.equal(first["ordered"], rows) and torch.equal(second["ordered"], rows)
