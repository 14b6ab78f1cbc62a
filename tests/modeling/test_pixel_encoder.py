"""The convolutional encoder of the paper's baselines, alone and inside the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.configuration import VisionTowerConfig
from vilau.modeling.pixel_encoder import PixelEncoder
from vilau.modeling.vision_tower import VisionTower

FIELDS: dict[str, Any] = {
    "image_encoder_config": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "encoder_type": "conv",
    "code_dim": 16,
    "depth": 2,
    "codebook_size": 32,
    "decoder_channels": 8,
    "decoder_multipliers": [1, 1, 2, 2],
    "decoder_blocks": 1,
    "decoder_attention": [4],
    "decoder_latent_channels": 16,
    "decoder_groups": 8,
}


def _tower(**changes: Any) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VisionTowerConfig(**{**FIELDS, **changes})).eval()


def test_shapes_and_halvings() -> None:
    """Protects the layout: each multiplier after the first halves the side, and the last map has the codes' width."""
    encoder = PixelEncoder(16, 32, 16, 8, (1, 1, 2, 2), 1, (4,), 8)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 16, 4, 4)
    assert [len(stage.attention) for stage in encoder.stages] == [0, 0, 0, 1]


def test_padding_stands_below_and_right() -> None:
    """Protects RQ-VAE's function: zeros are added below and right of what a strided convolution sees."""
    stage = PixelEncoder(8, 8, 8, 8, (1, 1), 1, (), 8).stages[0]
    x = torch.randn(1, 8, 8, 8)
    plain = x
    for block in stage.blocks:
        plain = block(plain)
    padded = torch.zeros(1, 8, 9, 9)
    padded[:, :, :8, :8] = plain
    assert torch.allclose(stage(x), stage.downsample(padded), atol=1e-6)


def test_tower_encodes_decodes_and_embeds() -> None:
    """Protects the baseline tower: the same interface as the SigLIP tower, with gradients to the encoder."""
    tower = _tower()
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    codes = tower.encode(pixels)
    assert codes.shape == (3, 16, 2) and tower.decode(codes).shape == (3, 3, 32, 32)
    output = tower.train()(pixels)
    assert output.image_embeds.shape == (3, 32)
    output.image_embeds[:, 0].sum().backward()
    assert tower.pixel_encoder is not None
    assert float(tower.pixel_encoder.conv_in.weight.grad.abs().sum()) > 0
    assert len(tower.image_encoder.encoder.layers) == 1


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Protects checkpoints of the baseline: what is saved loads bit for bit."""
    tower = _tower()
    tower.save_pretrained(tmp_path)
    again = VisionTower.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), again.state_dict().values(), strict=True))


def test_wrong_sizes_are_named() -> None:
    """Protects users: sizes that do not fit the convolutional encoder are refused with the number to set."""
    with pytest.raises(ValueError, match="set patch_size to 8"):
        _tower(image_encoder_config={**FIELDS["image_encoder_config"], "patch_size": 4}, latent_size=4)
    with pytest.raises(ValueError, match="set code_dim"):
        _tower(code_dim=None)
