"""From pixels to features: the convolutional encoder of RQ-VAE, for the paper's baselines (Tables 1, 8, Appendix C)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from vilau.modeling.pixel_decoder import AttentionBlock, ResidualBlock, ResolutionStage


class DownStage(ResolutionStage):
    """The blocks of one resolution, then, unless it is the last, a strided convolution that halves it."""

    def __init__(self, in_channels: int, channels: int, blocks: int, groups: int, attention: bool, down: bool) -> None:
        super().__init__(in_channels, channels, blocks, groups, attention)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2) if down else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # one row and column below and right, as RQ-VAE pads
        return x


class PixelEncoder(nn.Module):
    """Turn pictures into a map of features; the mirror image of `PixelDecoder`.

    Args:
        code_dim: channels `C` of the map.
        image_size: side `S` of the pictures.
        latent_channels: channels before the 1x1 `quant_conv`.
        channels, multipliers, blocks: width per resolution, finest first; every step between two is a halving.
        attention: resolutions (sides) with attention blocks.
        groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        code_dim: int,
        image_size: int,
        latent_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.stages = nn.ModuleList()
        width, side = channels, image_size
        for level, wanted in enumerate(widths):
            last = level + 1 == len(widths)
            self.stages.append(DownStage(width, wanted, blocks, groups, side in attention, down=not last))
            width, side = wanted, side if last else side // 2
        self.mid = nn.Sequential(
            ResidualBlock(width, width, groups), AttentionBlock(width, groups), ResidualBlock(width, width, groups)
        )
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the feature map ``(I, C, h, w)`` of pictures ``(I, 3, S, S)`` in [-1, 1]."""
        x = self.conv_in(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))
