"""What stands at each position of the unified sequence, and which positions are predicted (METHOD, section 2).

A sequence holds text tokens and visual positions. Every position carries an explicit kind (`PositionKind`) and
explicit supervision masks: nothing is guessed from token ids, so user text may contain any placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vilau.configuration import PositionKind


@dataclass(frozen=True)
class Targets:
    """Where the hidden states that predict supervised positions stand, as flat indices into ``(B * L)``.

    `text_from` (T,) predicts `text_ids` (T,); `visual_from` (V,) predicts the codes at row `visual_rows` (V,) of the
    batch's visual positions, counted in row-major order. `text_at` and `visual_at` are the predicted positions.
    """

    text_from: torch.Tensor
    text_ids: torch.Tensor
    text_at: torch.Tensor
    visual_from: torch.Tensor
    visual_rows: torch.Tensor
    visual_at: torch.Tensor


def check_sequence(input_ids: torch.Tensor, kinds: torch.Tensor, visual_positions: int) -> None:
    """Raise ValueError unless shapes agree and the visual positions of `kinds` are exactly the given number."""
    if input_ids.shape != kinds.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and kinds {tuple(kinds.shape)} must have one shape")
    count = int((kinds == PositionKind.VISUAL).sum())
    if count != visual_positions:
        raise ValueError(
            f"the sequence has {count} visual positions but the pictures given bring {visual_positions}; "
            "pass one picture (or frame) for every run of visual positions"
        )


def splice(text_embeds: torch.Tensor, kinds: torch.Tensor, visual_embeds: torch.Tensor) -> torch.Tensor:
    """Put ``visual_embeds`` (V, H) at the visual positions of ``text_embeds`` (B, L, H), in row-major order."""
    mask = (kinds == PositionKind.VISUAL).unsqueeze(-1)
    return text_embeds.masked_scatter(mask, visual_embeds.to(text_embeds.dtype))


def find_targets(
    input_ids: torch.Tensor, kinds: torch.Tensor, text_targets: torch.Tensor, visual_targets: torch.Tensor
) -> Targets:
    """Turn supervision masks into indices: the state at position j - 1 predicts position j.

    Args:
        input_ids, kinds: ``(B, L)``.
        text_targets, visual_targets: bool masks ``(B, L)`` of the predicted positions.

    Raises:
        ValueError: a mask covers positions of the other kind, or the first position of a row.
    """
    is_text, is_visual = kinds == PositionKind.TEXT, kinds == PositionKind.VISUAL
    if bool((text_targets & ~is_text).any()):
        raise ValueError("text_targets cover positions that hold no text token")
    if bool((visual_targets & ~is_visual).any()):
        raise ValueError("visual_targets cover positions that hold no visual code")
    if bool((text_targets | visual_targets)[:, 0].any()):
        raise ValueError("the first position of a sequence cannot be predicted; unset its target")
    text_at = text_targets.flatten().nonzero().squeeze(1)
    visual_at = visual_targets.flatten().nonzero().squeeze(1)
    row_of = is_visual.flatten().long().cumsum(0) - 1
    return Targets(text_at - 1, input_ids.flatten()[text_at], text_at, visual_at - 1, row_of[visual_at], visual_at)
