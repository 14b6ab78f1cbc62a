"""Classifier-free guidance over the logits of every depth step (METHOD, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: part,
    "cosine": lambda part: (1 - math.cos(math.pi * part)) / 2,
}


def guided_logits(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``uncond + scale * (cond - uncond)`` (N, K) of stacked rows ``logits`` (2N, K), conditional first."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def guided_rows(logits: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return guided logits ``(B, K)`` of rows ``logits`` (R, K), of which the first B are conditional.

    Args:
        unconditional: ``(B,)`` int64, the row without the prompt of each picture; its own row where it has none.
        scale: ``(B, 1)``; where it is 1 the conditional logits come out as they are.
    """
    conditional = logits[: len(scale)].float()
    return torch.lerp(logits.index_select(0, unconditional).float(), conditional, scale)


def guidance_table(
    scales: Sequence[float], positions: int, per_picture: int, schedule: str, interval: tuple[float, float]
) -> torch.Tensor:
    """Return the guidance scale ``(positions, B)`` float32 of every position and picture, on the CPU.

    Args:
        scales: the full scale of each of the B pictures (or films).
        positions: of a picture, or of all frames of a film.
        per_picture: positions of one picture or frame: schedule and interval begin anew with each.
        schedule: a name of `SCHEDULES`: how the scale grows from 1 over the picture.
        interval: the part of the picture, 0 to 1, that is guided; outside it the scale is 1.
    """
    low, high = interval
    shares = []
    for position in range(positions):
        place = position % per_picture
        part = place / max(1, per_picture - 1)
        inside = low <= place / per_picture < high
        shares.append(SCHEDULES[schedule](part) if inside else 0.0)
    share = torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
    return (1 + share * (torch.tensor(list(scales), dtype=torch.float64) - 1)).float()
