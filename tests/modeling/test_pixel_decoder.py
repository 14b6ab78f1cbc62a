"""The pixel decoder: shapes at several sizes, resizing of the latent map, refusals, gradients to every weight."""

from __future__ import annotations

import pytest
import torch

from vilau.modeling.pixel_decoder import AttentionBlock, PixelDecoder, ResidualBlock


def build(**changes: object) -> PixelDecoder:
    """A small decoder: 2x2 latents, doubled twice."""
    torch.manual_seed(0)
    sizes = {
        "code_dim": 6,
        "latent_side": 2,
        "latent_channels": 8,
        "channels": 8,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "attention": (2,),
        "groups": 4,
    }
    return PixelDecoder(**(sizes | changes))


@pytest.mark.parametrize(("multipliers", "side"), [((1,), 2), ((1, 2), 4), ((1, 1, 2, 2), 16)])
def test_every_multiplier_after_the_first_is_one_doubling(multipliers: tuple[int, ...], side: int) -> None:
    """The configuration computes the picture's size from this rule."""
    assert build(multipliers=multipliers)(torch.randn(3, 6, 2, 2)).shape == (3, 3, side, side)


def test_other_latent_sides_are_resized_bilinearly() -> None:
    """27x27 becomes 24x24 before `post_quant_conv` in the released 384 px model (METHOD, section 1)."""
    decoder = build(latent_side=4).eval()
    z_q = torch.randn(2, 6, 5, 5)
    small = torch.nn.functional.interpolate(z_q, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(z_q), decoder(small))


def test_pictures_do_not_mix() -> None:
    """No statistics over the batch: a picture is drawn the same alone and among others."""
    decoder = build().eval()
    z_q = torch.randn(4, 6, 2, 2)
    torch.testing.assert_close(decoder(z_q)[2:3], decoder(z_q[2:3]), rtol=1e-4, atol=1e-5)


def test_attention_stands_where_it_was_asked_for() -> None:
    """`decoder_attention` lists resolutions: blocks + 1 attention blocks there, none elsewhere."""
    decoder = build(attention=(4,))
    assert [len(stage.attention) for stage in decoder.stages] == [0, 2, 0]
    assert [len(stage.blocks) for stage in decoder.stages] == [2, 2, 2]


def test_attention_block_equals_the_formula() -> None:
    """X + W_o softmax(q k^T / sqrt(C)) v over all places, written out."""
    torch.manual_seed(0)
    block = AttentionBlock(8, 4)
    x = torch.randn(2, 8, 3, 3)
    normed = block.norm(x).flatten(2)  # (I, C, S*S)
    q, k, v = (
        torch.einsum("oc,ncs->nos", m.weight[:, :, 0, 0], normed) + m.bias[:, None]
        for m in (block.query, block.key, block.value)
    )
    weights = (torch.einsum("ncs,nct->nst", q, k) / 8**0.5).softmax(-1)
    mixed = torch.einsum("nst,nct->ncs", weights, v)
    out = torch.einsum("oc,ncs->nos", block.out.weight[:, :, 0, 0], mixed) + block.out.bias[:, None]
    torch.testing.assert_close(block(x), x + out.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_residual_block_with_zeroed_end_is_its_shortcut() -> None:
    """The block adds to a shortcut: with its last convolution at zero nothing else remains."""
    torch.manual_seed(0)
    for out_channels in (8, 12):
        block = ResidualBlock(8, out_channels, 4)
        torch.nn.init.zeros_(block.conv2.weight), torch.nn.init.zeros_(block.conv2.bias)
        x = torch.randn(1, 8, 4, 4)
        torch.testing.assert_close(block(x), block.shortcut(x))


def test_every_weight_gets_a_gradient() -> None:
    """No part of the decoder is dead."""
    decoder = build()
    decoder(torch.randn(2, 6, 2, 2)).square().mean().backward()
    without = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    without = [n for n in without if not n.endswith("key.bias")]  # softmax does not see a shift of all keys
    assert not without
    assert decoder.last_layer is decoder.conv_out.weight


def test_widths_that_groups_do_not_divide_are_refused() -> None:
    """The message names the widths and the groups."""
    with pytest.raises(ValueError, match=r"\[8, 12\] must all be multiples of decoder_groups 8"):
        build(channels=4, multipliers=(2, 3), groups=8)
