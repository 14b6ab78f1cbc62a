"""The visual loop: one position after another, D codes each, with caches and guidance in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from vilau.generation.guidance import guided_logits
from vilau.generation.sampling import SamplingOptions, draw_codes, filter_logits

Progress = Callable[[int, int], object]


class Cancelled(RuntimeError):
    """The progress callback returned ``False``."""


class UnifiedModel(Protocol):
    """What the loop needs of the joined network."""

    vision_tower: Any
    projector: Any
    language_model: Any
    depth_transformer: Any


@torch.no_grad()
def generate_codes(
    model: UnifiedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: int,
    options: SamplingOptions,
    seeds: torch.Tensor,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return ``codes`` (B, positions, D) that continue left-padded prompts.

    Args:
        model: the joined network.
        inputs_embeds: ``(R, L, H)`` ending with a visual start token. With guidance ``R = 2 B``, conditional rows
            first, unconditional second; with a guidance scale of 1 there are no unconditional rows and ``R = B``.
        attention_mask: ``(R, L)``, 0 at left padding.
        positions: visual positions to generate.
        seeds: ``(B,)`` int64, one per picture.
        progress: called with (done, total) after each position; returning ``False`` cancels.

    Raises:
        Cancelled: the callback asked for it.
    """
    decoder = model.language_model.base_model
    cache = DynamicCache(config=model.language_model.config)
    guided = options.guidance_scale != 1
    rows = len(seeds) * (2 if guided else 1)
    if len(inputs_embeds) != rows:
        raise ValueError(f"{len(inputs_embeds)} prompt rows for {len(seeds)} pictures; {rows} were expected")
    mask = torch.cat([attention_mask, attention_mask.new_ones((rows, positions))], 1)
    places = attention_mask.long().cumsum(1) - 1
    length = inputs_embeds.shape[1]
    embeds, place = inputs_embeds, places.clamp_min(0)
    chosen = []
    for position in range(positions):
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=mask[:, : length + position],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        codes = _depth_steps(model, hidden, options, seeds, position)
        chosen.append(codes)
        if progress is not None and progress(position + 1, positions) is False:
            raise Cancelled(f"cancelled after {position + 1} of {positions} positions")
        if position + 1 < positions:
            embeds = model.projector(model.vision_tower.quantizer.z_q(codes)).unsqueeze(1)
            embeds = (torch.cat([embeds, embeds]) if guided else embeds).to(inputs_embeds.dtype)
            place = place[:, -1:] + 1
    return torch.stack(chosen, 1)


def _depth_steps(
    model: UnifiedModel, hidden: torch.Tensor, options: SamplingOptions, seeds: torch.Tensor, position: int
) -> torch.Tensor:
    """Return the codes ``(B, D)`` of one position from hidden states ``(R, H)``; both halves get the same codes."""
    quantizer = model.vision_tower.quantizer
    guided = options.guidance_scale != 1
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    x, codes = hidden, []
    partial = torch.zeros((), device=hidden.device)
    for depth in range(quantizer.depth):
        logits = model.depth_transformer.step(x, depth, cache)
        if guided:
            logits = guided_logits(logits, options.guidance_scale)
        code = draw_codes(filter_logits(logits, options), seeds, position, depth)
        codes.append(code)
        partial = partial + quantizer.code_vectors(code, depth)
        x = (torch.cat([partial, partial]) if guided else partial).to(hidden.dtype)
    return torch.stack(codes, 1)
