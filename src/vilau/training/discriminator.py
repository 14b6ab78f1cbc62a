"""The PatchGAN discriminator of stage 1: says of overlapping patches whether they are of a real picture."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

_KERNEL = 4


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions, then one judgement per patch (Isola et al. 2017, as used by VQGAN and RQ-VAE).

    GroupNorm in place of batch norm: each picture is judged by itself, so that a batch means the same on any number of
    processes.

    Args:
        image_size: side of the pictures; only to refuse one that is too small.
        channels: width after the first convolution, doubled by each further one up to eight times.
        layers: convolutions with stride 2; RQ-VAE has 2, VQGAN 3.
        groups: groups of every GroupNorm; fewer where a width does not divide by it.

    Raises:
        ValueError: nothing is left of such a small picture after so many layers.
    """

    def __init__(self, image_size: int, channels: int = 64, layers: int = 3, groups: int = 32) -> None:
        super().__init__()
        side = image_size
        for _ in range(layers):
            side //= 2
        if side - 2 < 1:
            raise ValueError(
                f"a discriminator of {layers} layers leaves nothing of a picture of {image_size} px; set "
                f"discriminator.layers to at most {max(1, int(math.log2(max(image_size, 6) / 3)))}"
            )
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], _KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stride = 2 if number + 1 < layers else 1
            parts += [
                nn.Conv2d(before, width, _KERNEL, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(groups, width), width),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*parts)
        self.judge = nn.Conv2d(widths[-1], 1, _KERNEL, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return logits ``(I, 1, h, w)``, positive for "real", of pictures ``(I, 3, S, S)`` in [-1, 1]."""
        return self.judge(self.body(pixel_values))


def hinge_loss(real: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return what the discriminator minimises: half the mean of ``max(0, 1 - real)`` and ``max(0, 1 + drawn)``."""
    return (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2
