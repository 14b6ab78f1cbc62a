"""Configurations: derived sizes, refusals that say what to do, round trips, the paper's sizes on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.configuration import DepthTransformerConfig, PositionKind, VilaUConfig, VisionTowerConfig
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower

SIGLIP_LARGE = {
    "image_size": 256,
    "patch_size": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
SIGLIP_SO400M = {
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32004,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def test_position_kinds_are_the_stored_numbers() -> None:
    """Encoded samples and processors store these numbers: they must never move."""
    assert [PositionKind.TEXT, PositionKind.VISUAL, PositionKind.PAD] == [0, 1, 2]


def test_derived_sizes(make_config: Callable[..., VilaUConfig]) -> None:
    """Grid, positions and widths follow from the encoder, so that no two fields can disagree."""
    config = make_config()
    vision = config.vision_config
    assert (vision.image_size, vision.patch_size, vision.grid, vision.num_positions) == (16, 8, 2, 4)
    assert (vision.latent_side, vision.hidden_size, vision.code_width) == (2, 32, 8)
    assert make_config(code_dim=None).vision_config.code_width == 32
    assert config.hidden_size == 32


def test_visual_tokens_are_the_last_four_rows(make_config: Callable[..., VilaUConfig]) -> None:
    """The released layout: image start, image end, video start, video end close the vocabulary, unless given."""
    config = make_config()
    ids = [config.image_start_id, config.image_end_id, config.video_start_id, config.video_end_id]
    assert ids == [36, 37, 38, 39]
    assert make_config(video_end_id=7).video_end_id == 7


def test_round_trip_through_a_folder(make_config: Callable[..., VilaUConfig], tmp_path: Path) -> None:
    """A saved configuration describes the same model when it is read again, sub-configurations included."""
    config = make_config(num_frames=5, shared_codebook=False)
    config.save_pretrained(tmp_path)
    again = VilaUConfig.from_pretrained(tmp_path)
    assert isinstance(again.vision_config, VisionTowerConfig)
    assert isinstance(again.depth_config, DepthTransformerConfig)
    assert again.text_config.model_type == "llama"
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.shared_codebook is False and again.num_frames == 5


def test_any_causal_language_model_can_be_named() -> None:
    """METHOD, section 2: the language model is any of the library's, not Llama alone."""
    config = VilaUConfig(text_config={"model_type": "qwen2", "vocab_size": 50})
    assert type(config.text_config).__name__ == "Qwen2Config" and config.image_start_id == 46


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_type": "clip"}, ["encoder_type", "clip", "siglip"]),
        ({"stem": "wide"}, ["stem", "wide", "patch, conv"]),
        ({"quantizer": "fsq"}, ["quantizer", "fsq", "rq", "mcq", "none"]),
        ({"quantizer": "mcq", "code_dim": 10, "depth": 4}, ["10 channels", "4 equal chunks", "rest of 2", "code_dim"]),
        ({"codebook_learning": "adam"}, ["codebook_learning", "adam", "ema, gradient"]),
        ({"codebook_init": "zeros"}, ["codebook_init", "zeros", "kmeans, data, random"]),
        ({"code_noise": 1.0}, ["code_noise", "1.0", "below 1"]),
        ({"ema_decay": -0.5}, ["ema_decay", "-0.5"]),
        ({"code_noise_neighbours": 16384}, ["code_noise_neighbours", "16384", "codebook_size"]),
        ({"depth": 0}, ["depth", "0", "at least 1"]),
        ({"codebook_size": 0}, ["codebook_size", "0", "at least 1"]),
        ({"decoder_multipliers": [1, 1, 1]}, ["8 px", "16", "latent_size", "decoder_multipliers"]),
        ({"latent_size": 4}, ["32 px", "16", "latent_size"]),
        ({"num_frames": 0}, ["num_frames", "0", "at least 1"]),
        ({"depths": {"num_attention_heads": 3}}, ["hidden_size 16", "num_attention_heads 3"]),
    ],
)
def test_wrong_values_are_refused(
    make_config: Callable[..., VilaUConfig], changes: dict[str, Any], words: list[str]
) -> None:
    """A size that cannot work is refused at once, and the message names the value and what would work."""
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_patches_that_do_not_cover_the_picture() -> None:
    """The patch stem leaves a rest out, as SigLIP does at 384 px; the convolutional stem cannot, and says so."""
    encoder = {"image_size": 20, "patch_size": 8}
    two_by_two = {"latent_size": 5, "decoder_multipliers": [1, 1, 1]}
    assert VisionTowerConfig(image_encoder_config=encoder, **two_by_two).num_positions == 4
    with pytest.raises(ValueError, match="stem 'conv' needs an image_size that is a multiple"):
        VisionTowerConfig(image_encoder_config=encoder, stem="conv", **two_by_two)
    with pytest.raises(ValueError, match="4 is smaller than patch_size 8"):
        VisionTowerConfig(image_encoder_config={"image_size": 4, "patch_size": 8})


def test_the_7b_model_builds_from_the_same_classes() -> None:
    """Sizes are configuration: SigLIP-Large at 256 px, K = 16384, D = 4 and LLaMA-2-7B, on the meta device."""
    config = VilaUConfig(vision_config={"image_encoder_config": SIGLIP_LARGE}, text_config=LLAMA_2_7B)
    assert (config.vision_config.num_positions, config.vision_config.code_width, config.num_frames) == (256, 1024, 8)
    with torch.device("meta"):
        model = VilaUModel(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state["vision_tower.quantizer.codebook"] == (1, 16384, 1024)
    assert state["vision_tower.pixel_decoder.post_quant_conv.weight"] == (256, 1024, 1, 1)
    assert state["projector.fc1.weight"] == (4096, 1024)
    assert state["projector.fc2.weight"] == (4096, 4096)
    assert state["language_model.lm_head.weight"] == (32004, 4096)
    assert state["depth_transformer.project_hidden.weight"] == (1024, 4096)
    assert state["depth_transformer.project_codes.weight"] == (1024, 1024)
    assert state["depth_transformer.position_embedding"] == (4, 1024)
    assert state["depth_transformer.head.weight"] == (16384, 1024)
    assert len(model.depth_transformer.blocks) == 6
    size = sum(parameter.numel() for parameter in model.language_model.parameters())
    assert 6.7e9 < size < 6.8e9


def test_the_384_px_tower_builds_from_the_same_classes() -> None:
    """SO400M in patches of 14: a 27x27 grid whose quantised map is resized to the decoder's 24x24, D = 16."""
    config = VisionTowerConfig(image_encoder_config=SIGLIP_SO400M, depth=16, latent_size=24)
    assert (config.grid, config.num_positions, config.latent_side) == (27, 729, 24)
    with torch.device("meta"):
        tower = VisionTower(config)
        pixels = tower.decode_features(torch.empty(2, 729, 1152))
        features = tower.features(torch.empty(2, 3, 384, 384))
    assert pixels.shape == (2, 3, 384, 384)
    assert features.shape == (2, 729, 1152)
    with pytest.raises(ValueError, match="432 px"):
        VisionTowerConfig(image_encoder_config=SIGLIP_SO400M, depth=16)
