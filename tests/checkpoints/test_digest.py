"""The digest that codes and their tower are matched by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vilau
from vilau.checkpoints.digest import tower_digest


@pytest.mark.parametrize("changes", [{}, {"quantizer": "mcq", "depth": 2, "codebook_learning": "gradient"}])
def test_one_tower_has_one_digest(make_model: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """In a whole model, in a folder of its own, in half precision and after a look at data: the codes stay readable."""
    model = make_model(**changes)
    wanted = tower_digest(model.vision_tower)
    model.save_pretrained(tmp_path / "whole")
    alone = vilau.VisionTower.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone")
    for folder in ("whole", "alone"):
        for dtype in (torch.float32, torch.bfloat16):
            assert tower_digest(vilau.VisionTower.from_pretrained(tmp_path / folder, dtype=dtype)) == wanted
    for name, buffer in alone.quantizer.named_buffers():
        if name.startswith("ema_"):
            buffer.add_(1)
    assert tower_digest(alone) == wanted


@pytest.mark.parametrize("part", ["image_encoder", "quantizer", "pixel_decoder"])
def test_another_tower_has_another_digest(make_model: Callable[..., Any], part: str) -> None:
    """One changed weight of what codes go through is seen; of the decoder only where pictures are drawn from them."""
    tower = make_model().vision_tower
    before, without = tower_digest(tower), tower_digest(tower, decoder=False)
    with torch.no_grad():
        tensors = [t for name, t in getattr(tower, part).state_dict().items() if "head" not in name and t.ndim > 1]
        tensors[0].flatten()[0] += 1
    assert tower_digest(tower) != before
    assert (tower_digest(tower, decoder=False) == without) == (part == "pixel_decoder")
