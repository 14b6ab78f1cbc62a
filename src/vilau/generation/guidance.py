"""Classifier-free guidance over the logits of every depth step (METHOD, section 2)."""

from __future__ import annotations

import torch


def guided_logits(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``uncond + scale * (cond - uncond)`` (N, K) of stacked rows ``logits`` (2N, K), conditional first."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)
