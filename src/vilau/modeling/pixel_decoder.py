"""From quantised features to pixels: the convolutional decoder of RQ-VAE / VQGAN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: ``(I, in, S, S)`` -> ``(I, out, S, S)``."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all places of the map, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (m(normed).flatten(2).transpose(1, 2) for m in (self.query, self.key, self.value))  # (I, S*S, C)
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class ResolutionStage(nn.Module):
    """The blocks of one resolution, each followed by attention where asked: ``(I, in, S, S)`` -> ``(I, out, S, S)``."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, groups: int, attention: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else channels, channels, groups, dropout) for i in range(blocks)
        )
        self.attention = nn.ModuleList(AttentionBlock(channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[i](x)
        return x


class UpStage(ResolutionStage):
    """The blocks of one resolution, then, unless it is the last, a nearest x2 upsampling with a convolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        groups: int,
        attention: bool,
        up: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, channels, blocks, groups, attention, dropout)
        self.upsample = nn.Conv2d(channels, channels, 3, padding=1) if up else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelDecoder(nn.Module):
    """Draw pictures from latent maps (paper, section 3.1: the decoder of RQ-VAE).

    Args:
        code_dim: channels `C` of the quantised map.
        latent_side: side of the latent map; an input of another side is resized bilinearly first.
        latent_channels: channels after the 1x1 `post_quant_conv`.
        channels, multipliers, blocks: width per resolution, finest first; every step between two is a doubling.
        attention: resolutions (sides) with attention blocks.
        groups: groups of every GroupNorm.
        dropout: in training, before the second convolution of every residual block.
    """

    def __init__(
        self,
        code_dim: int,
        latent_side: int,
        latent_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.latent_side = latent_side
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        widths = [channels * m for m in multipliers]
        if any(w % groups for w in widths):
            raise ValueError(f"decoder widths {widths} must all be multiples of decoder_groups {groups}")
        top = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, top, 3, padding=1)
        self.mid = nn.Sequential(
            ResidualBlock(top, top, groups, dropout),
            AttentionBlock(top, groups),
            ResidualBlock(top, top, groups, dropout),
        )
        self.stages = nn.ModuleList()
        width, side = top, latent_side
        for level in reversed(range(len(widths))):
            self.stages.append(UpStage(width, widths[level], blocks + 1, groups, side in attention, level > 0, dropout))
            width, side = widths[level], side * 2
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight whose gradient norms balance the adversarial loss."""
        return self.conv_out.weight

    def forward(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return pixels ``(I, 3, S, S)``, about [-1, 1], of the quantised map ``z_q`` (I, C, h, w).

        Of a map with fewer rows than columns, the upper part of a picture, as many rows of pixels as it covers.
        """
        if z_q.shape[-1] != self.latent_side:
            rows = max(1, round(z_q.shape[-2] * self.latent_side / z_q.shape[-1]))
            size = (rows, self.latent_side)
            z_q = F.interpolate(z_q.float(), size=size, mode="bilinear", align_corners=False).to(z_q.dtype)
        x = self.mid(self.conv_in(self.post_quant_conv(z_q)))
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))
