"""The vision tower: which layers make features and embeddings, encode/decode, kinds of stem, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionModel

from vilau.configuration import VilaUConfig
from vilau.modeling.vision_tower import VisionTower

TEXT_ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_size": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def make_tower(make_config: Callable[..., VilaUConfig]) -> Callable[..., VisionTower]:
    """A function that returns a small tower with a text encoder in evaluation mode."""

    def build(**changes: Any) -> VisionTower:
        torch.manual_seed(0)
        return VisionTower(make_config(**({"text_encoder_config": TEXT_ENCODER} | changes)).vision_config).eval()

    return build


def pictures(number: int = 3, side: int = 16) -> torch.Tensor:
    """Random pictures (number, 3, side, side) in [-1, 1]."""
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_features_are_the_last_but_one_layer_without_the_final_norm(make_tower: Callable[..., VisionTower]) -> None:
    """METHOD, section 1: z_e are the library's hidden states [-2], not the normed output (`code_dim` absent)."""
    tower = make_tower(code_dim=None)
    reference: SiglipVisionModel = tower.image_encoder
    with torch.no_grad():
        hidden = reference(pictures(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower.features(pictures()), hidden[-2])


def test_unquantised_embedding_is_siglips_own(make_tower: Callable[..., VisionTower]) -> None:
    """Last layer, final norm and pooling head rejoin to the plain encoder when nothing is quantised."""
    tower = make_tower(code_dim=None)
    with torch.no_grad():
        pooled = tower.image_encoder(pictures()).pooler_output
        out = tower(pictures(), quantize=False)
    torch.testing.assert_close(out.image_embeds, torch.nn.functional.normalize(pooled, dim=-1))
    assert out.codes is None and float(out.commitment) == 0 and out.z_q is out.z_e


def test_embedding_comes_from_the_quantised_features(make_tower: Callable[..., VisionTower]) -> None:
    """Section 3.1: the contrast sees z_q, so that codes carry meaning; its gradient reaches the encoder."""
    tower = make_tower()
    with torch.no_grad():
        out = tower(pictures())
        z_q = tower.quantizer.z_q(out.codes)
        torch.testing.assert_close(out.image_embeds, tower.image_embeds(z_q))
        assert not torch.allclose(out.image_embeds, tower.image_embeds(out.z_e), atol=1e-3)
    tower(pictures()).image_embeds[:, 0].sum().backward()
    assert tower.image_encoder.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_encode_is_the_codes_of_forward(make_tower: Callable[..., VisionTower]) -> None:
    """Stored codes and codes of training are one computation; shapes (I, P, D), values in [0, K)."""
    tower = make_tower()
    codes = tower.encode(pictures())
    assert codes.shape == (3, 4, 3) and int(codes.min()) >= 0 and int(codes.max()) < 16
    with torch.no_grad():
        assert torch.equal(codes, tower(pictures()).codes)
    assert torch.equal(codes[1:2], tower.encode(pictures()[1:2]))


def test_large_maps_are_drawn_alike_alone_and_together(make_tower: Callable[..., VisionTower]) -> None:
    """Weights laid out anew for maps of 16 x 16 draw the same picture, a frame alone as in its film, bit for bit."""
    tower = make_tower(latent_size=16, decoder_multipliers=[1]).eval()
    codes = torch.randint(0, tower.config.codebook_size, (3, tower.config.num_positions, tower.config.depth))
    assert tower._channels_last_weights()["conv_in.weight"].is_contiguous(memory_format=torch.channels_last)
    drawn = tower.decode(codes)
    assert torch.equal(torch.cat([tower.decode(one) for one in codes.split(1)]), drawn)
    plain = tower.decode_features(tower.quantizer.z_q(codes)).clamp(-1, 1)
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-5)
    assert tower.pixel_decoder.conv_in.weight.is_contiguous()


def test_decode_draws_what_the_codes_say(make_tower: Callable[..., VisionTower]) -> None:
    """Codes -> z_q -> pixels in [-1, 1], in chunks of any size, positions in row-major order."""
    tower = make_tower()
    codes = torch.randint(16, (5, 4, 3), generator=torch.Generator().manual_seed(2))
    pixels = tower.decode(codes)
    assert pixels.shape == (5, 3, 16, 16) and float(pixels.abs().max()) <= 1
    torch.testing.assert_close(tower.decode(codes, chunk=2), pixels)
    with torch.no_grad():
        z_q = tower.quantizer.z_q(codes)  # (I, P, C)
        grid = z_q.reshape(5, 2, 2, 8).permute(0, 3, 1, 2)
        torch.testing.assert_close(tower.pixel_decoder(grid).clamp(-1, 1), pixels)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 1, 16, 16), (3, 16, 16), (3, 3, 16, 8)])
def test_pictures_of_another_size_are_refused(make_tower: Callable[..., VisionTower], shape: tuple[int, ...]) -> None:
    """A wrong size is named with the right one, instead of a failure deep in a convolution."""
    with pytest.raises(ValueError, match="needs \\(images, 3, 16, 16\\)"):
        make_tower().encode(torch.zeros(shape))


def test_text_embeddings(make_tower: Callable[..., VisionTower]) -> None:
    """Normalised text embeddings of the pictures' width; a tower without a text encoder says so."""
    ids = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    embeds = make_tower().text_embeds(ids)
    assert embeds.shape == (3, 32)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    with pytest.raises(ValueError, match="no text encoder"):
        make_tower(text_encoder_config=None).text_embeds(ids)


def test_convolutional_stem(make_tower: Callable[..., VisionTower]) -> None:
    """The stem of the small models gives the same grid, learns, and refuses patches it cannot halve to."""
    tower = make_tower(stem="conv")
    assert tower.features(pictures()).shape == (3, 4, 8)
    tower(pictures()).image_embeds.sum().backward()
    assert all(conv.weight.grad is not None for conv in tower.image_encoder.embeddings.patch_embedding.convs)
    encoder = {"image_size": 12, "patch_size": 6, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="power of two"):
        make_tower(stem="conv", image_encoder_config=encoder, latent_size=6, decoder_multipliers=[1, 1])


def test_zero_init_residual_starts_as_identity(make_tower: Callable[..., VisionTower]) -> None:
    """With `zero_init_residual` every encoder layer starts as the identity."""
    tower = make_tower(zero_init_residual=True)
    hidden = torch.randn(2, 4, 32)
    with torch.no_grad():
        for layer in tower.image_encoder.encoder.layers:
            torch.testing.assert_close(layer(hidden, None), hidden)


@pytest.mark.parametrize("changes", [{}, {"shared_codebook": False, "stem": "conv"}, {"code_dim": None}])
def test_saving_and_loading(make_tower: Callable[..., VisionTower], tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights, codebook, averages and the library's own buffers come back: same codes, pictures and embeddings."""
    tower = make_tower(**changes)
    tower.quantizer.ema_count += 3
    tower.quantizer.initialised.fill_(1)
    tower.save_pretrained(tmp_path)
    again, info = VisionTower.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    one, two = tower.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    ids = torch.randint(1, 40, (2, 8))
    again.eval()
    with torch.no_grad():
        a, b = tower(pictures()), again(pictures())
        assert torch.equal(a.codes, b.codes) and torch.equal(a.image_embeds, b.image_embeds)
        assert torch.equal(tower.text_embeds(ids), again.text_embeds(ids))


def test_loading_in_half_precision_keeps_the_codebook(make_tower: Callable[..., VisionTower], tmp_path: Path) -> None:
    """`from_pretrained(dtype=bfloat16)` casts the weights, never the codebook and its averages."""
    tower = make_tower()
    tower.save_pretrained(tmp_path)
    half = VisionTower.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.to_code.weight.dtype == torch.bfloat16
    for name in ("codebook", "ema_count", "ema_sum"):
        buffer = getattr(half.quantizer, name)
        assert buffer.dtype == torch.float32 and torch.equal(buffer, getattr(tower.quantizer, name))
    assert half.encode(pictures().bfloat16()).shape == (3, 4, 3)
    assert half.decode(torch.zeros(1, 4, 3, dtype=torch.long)).dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    twice = VisionTower.from_pretrained(tmp_path / "half")
    assert torch.equal(twice.quantizer.codebook, tower.quantizer.codebook)


@pytest.mark.parametrize("changes", [{}, {"quantizer": "mcq", "code_dim": 12}, {"quantizer": "none"}])
def test_pictures_of_training_need_no_kind(make_tower: Callable[..., VisionTower], changes: dict[str, Any]) -> None:
    """What the first codes keep, (I, P, D, C), ends in what the tower reconstructs from, codes or not."""
    tower = make_tower(**changes)
    partial = tower.partial_features(pictures())
    with torch.no_grad():
        out = tower(pictures())
    assert partial.shape == (3, 4, 1 if changes.get("quantizer") == "none" else 3, tower.config.code_width)
    torch.testing.assert_close(partial[:, :, -1], out.z_q)
    assert (out.codes is None) == (changes.get("quantizer") == "none")


def test_code_noise_is_for_the_decoder(make_tower: Callable[..., VisionTower]) -> None:
    """In training the decoder draws from disturbed codes, while embeddings and codes are the undisturbed ones."""
    tower = make_tower(code_noise=0.9)
    tower.quantizer.initialised.fill_(1)
    with torch.no_grad():
        quiet, noisy = tower(pictures()), tower.train()(pictures())
    assert torch.equal(quiet.codes, noisy.codes) and torch.equal(quiet.image_embeds, noisy.image_embeds)
    assert not torch.allclose(quiet.z_q, noisy.z_q)
