"""Pictures of what a tower keeps: originals, reconstructions, and reconstructions from the first d codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vilau.files import atomic_path
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.images import normalise, to_pixels

STRIP = 10  # pictures in a row


@torch.no_grad()
def reconstruction_rows(tower: VisionTower, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Return rows ``(N, 3, S, S)`` of pictures ``(N, 3, S, S)``: themselves, then decoded from the first 1 to D codes.

    A tower of continuous tokens has no codes and one row beside the originals.
    """
    partial = tower.partial_features(pixel_values)  # (N, P, D, C)
    return [pixel_values, *(tower.decode_features(part).clamp(-1, 1) for part in partial.unbind(2))]


def draw_strip(tower: VisionTower, frames: np.ndarray, target: Path) -> None:
    """Write a PNG of the first pictures at their own size: a row of originals, then one row for each depth."""
    values = torch.from_numpy(normalise(frames[:STRIP])).to(tower.device, tower.dtype)
    rows = [to_pixels(row.float().cpu().numpy()) for row in reconstruction_rows(tower, values)]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", optimize=True)
