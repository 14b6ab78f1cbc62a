"""The PatchGAN discriminator: sizes, pictures judged one by one, the hinge loss."""

from __future__ import annotations

import pytest
import torch

from vilau.training.discriminator import PatchDiscriminator, hinge_loss


@pytest.mark.parametrize(("side", "layers", "patches"), [(32, 2, 6), (32, 3, 2), (256, 3, 30), (384, 2, 94)])
def test_sizes(side: int, layers: int, patches: int) -> None:
    """One logit per patch from 32 to 384 px."""
    with torch.device("meta"):
        judge = PatchDiscriminator(side, channels=8, layers=layers)
        assert judge(torch.zeros(2, 3, side, side)).shape == (2, 1, patches, patches)


def test_pictures_are_judged_one_by_one() -> None:
    """No batch statistics: a picture's logits do not depend on its neighbours, so processes may share a batch."""
    torch.manual_seed(0)
    judge = PatchDiscriminator(32, channels=8)
    pictures = torch.randn(4, 3, 32, 32)
    together = judge(pictures)
    torch.testing.assert_close(torch.cat([judge(picture.unsqueeze(0)) for picture in pictures]), together)
    assert together.std() > 0


def test_groups_follow_the_width() -> None:
    """A width that 32 groups do not divide takes fewer."""
    judge = PatchDiscriminator(32, channels=12, layers=2, groups=32)
    norms = [m for m in judge.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [(n.num_groups, n.num_channels) for n in norms] == [(8, 24), (16, 48)]


def test_a_picture_too_small_is_refused() -> None:
    """The error names both numbers and what would fit; that many layers indeed fit."""
    with pytest.raises(ValueError, match="5 layers leaves nothing of a picture of 32 px; .* to at most 3"):
        PatchDiscriminator(32, layers=5)
    assert PatchDiscriminator(32, channels=4, layers=3)(torch.zeros(1, 3, 32, 32)).numel() > 0


def test_hinge_loss() -> None:
    """Half of the two means; logits beyond the margin cost nothing."""
    assert float(hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0]))) == pytest.approx((0.25 + 1.0) / 2)
    assert float(hinge_loss(torch.tensor([1.0]), torch.tensor([-1.0]))) == 0.0
