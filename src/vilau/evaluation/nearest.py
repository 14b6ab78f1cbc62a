"""A second judge without weights: which real render of the world is nearest, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch

from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World


class NearestRender:
    """All combinations of objects and backgrounds, big and near the middle.

    Args:
        world: whose objects, colours and styles are compared.
        image_size: side of the pictures in pixels.
        shift: drawings may stand off the middle by so many thirty-seconds of the side.
    """

    def __init__(self, world: World, image_size: int, shift: int = 1) -> None:
        steps = range(-shift, shift + 1)
        self.labels: list[tuple[str, str]] = []
        pictures = []
        for style in world.styles:
            for name in world.names:
                for colour in world.colours:
                    for x in steps:
                        for y in steps:
                            scene = single(name, colour, style, shift=(x / 32, y / 32))
                            pictures.append(render(scene, world, image_size))
                            self.labels.append((name, colour))
        flat = np.stack(pictures).transpose(0, 3, 1, 2).reshape(len(pictures), -1)
        self.pixels = torch.from_numpy(flat).float().div_(127.5).sub_(1.0)
        self.half_norms = self.pixels.square().sum(1) / 2

    def name(self, pixel_values: torch.Tensor, chunk: int = 64) -> list[tuple[str, str]]:
        """Return (object, background) of the render nearest to each picture ``(N, 3, S, S)`` in [-1, 1]."""
        found: list[int] = []
        for part in pixel_values.detach().to("cpu", torch.float32).flatten(1).split(chunk):
            found += (self.half_norms - part @ self.pixels.t()).argmin(1).tolist()
        return [self.labels[row] for row in found]
