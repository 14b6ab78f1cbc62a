"""How much of a codebook is used: counts per depth that add up over batches, steps and processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vilau.modeling.codebook_search import sum_over_processes


@dataclass(frozen=True)
class CodebookUsage:
    """How often each code was chosen at each depth: `counts` (D, K) int64. Add two of them with ``+``."""

    counts: torch.Tensor

    def __add__(self, other: CodebookUsage) -> CodebookUsage:
        return CodebookUsage(self.counts + other.counts)

    def over_processes(self) -> CodebookUsage:
        """Return the counts of all processes together; every one must ask."""
        counts = self.counts.clone()
        sum_over_processes(counts)
        return CodebookUsage(counts)

    def shared(self) -> CodebookUsage:
        """Return the counts of all depths together ``(1, K)``: how one codebook for all depths is used."""
        return CodebookUsage(self.counts.sum(0, keepdim=True))

    @property
    def used(self) -> torch.Tensor:
        """Number of codes ``(D,)`` that occurred at all."""
        return (self.counts > 0).sum(1)

    @property
    def share(self) -> torch.Tensor:
        """Share ``(D,)`` in [0, 1] of the codebook that occurred."""
        return self.used / self.counts.shape[1]

    @property
    def perplexity(self) -> torch.Tensor:
        """Exponential ``(D,)`` of the entropy of the codes: K when all are equally frequent, 1 when it is always one.

        Without any code it is 1.
        """
        odds = self.counts.double() / self.counts.sum(1, keepdim=True).clamp_min(1)
        return torch.special.entr(odds).sum(1).exp().float()


def codebook_usage(codes: torch.Tensor, codebook_size: int) -> CodebookUsage:
    """Return the `CodebookUsage` of ``codes`` (..., D) in [0, `codebook_size`)."""
    depth = codes.shape[-1]
    places = codes.reshape(-1, depth) + torch.arange(depth, device=codes.device) * codebook_size
    counts = torch.zeros(depth * codebook_size, dtype=torch.long, device=codes.device)
    counts.index_add_(0, places.flatten(), torch.ones_like(places.flatten()))
    return CodebookUsage(counts.view(depth, codebook_size))
