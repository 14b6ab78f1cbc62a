"""Counts of codes: per depth, summable over steps and processes, and what usage and perplexity they give."""

from __future__ import annotations

import torch

from modeling.processes import in_two_processes
from vilau.modeling.codebook_usage import codebook_usage


def test_counts_equal_a_plain_count() -> None:
    """`counts` (D, K) says how often each code occurred at each depth, for codes of any leading shape."""
    codes = torch.randint(6, (4, 5, 3), generator=torch.Generator().manual_seed(0))
    usage = codebook_usage(codes, 8)
    for depth in range(3):
        for code in range(8):
            assert int(usage.counts[depth, code]) == int((codes[..., depth] == code).sum())
    assert usage.used.tolist() == [len(codes[..., depth].unique()) for depth in range(3)]
    torch.testing.assert_close(usage.share, usage.used / 8)


def test_perplexity() -> None:
    """K for codes equally frequent, 1 for always the same one, in between the exponential of the entropy."""
    codes = torch.stack([torch.arange(8), torch.full((8,), 3), torch.arange(8) // 4], 1)
    usage = codebook_usage(codes, 8)
    torch.testing.assert_close(usage.perplexity, torch.tensor([8.0, 1.0, 2.0]))
    assert codebook_usage(codes[:0], 8).perplexity.tolist() == [1, 1, 1]


def test_sums_are_those_of_the_whole() -> None:
    """Adding the usage of parts of a batch gives that of the batch; `shared` pools the depths."""
    codes = torch.randint(9, (50, 2), generator=torch.Generator().manual_seed(1))
    whole = codebook_usage(codes, 9)
    parts = codebook_usage(codes[:20], 9) + codebook_usage(codes[20:], 9)
    assert torch.equal(parts.counts, whole.counts)
    assert torch.equal(whole.shared().counts[0], torch.bincount(codes.flatten(), minlength=9))


def _count(rank: int) -> torch.Tensor:
    codes = torch.randint(9, (50, 2), generator=torch.Generator().manual_seed(1))
    return codebook_usage(codes[:20] if rank == 0 else codes[20:], 9).over_processes().counts


def test_processes_agree_on_the_sum() -> None:
    """Two processes with uneven shares of a batch report its usage, both the same."""
    codes = torch.randint(9, (50, 2), generator=torch.Generator().manual_seed(1))
    first, second = in_two_processes(_count)
    assert torch.equal(first, second) and torch.equal(first, codebook_usage(codes, 9).counts)
