from __future__ import annotations

import numpy as np
import torch

from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World
from vilau.evaluation.nearest import NearestRender
from vilau.processing.images import normalise


def test_names_real_renders_and_noisy_ones() -> None:
    """The second judge is right on what it holds, also with noise."""
    world = World.load(objects=12)
    nearest = NearestRender(world, 32, shift=0)
    pairs = [(n, c) for n in world.names for c in world.colours]
    pixels = torch.from_numpy(normalise(np.stack([render(single(*pair), world, 32) for pair in pairs])))
    assert nearest.name(pixels) == pairs
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert nearest.name(noisy) == pairs
