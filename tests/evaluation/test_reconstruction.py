from __future__ import annotations

import pytest
import torch

from vilau.evaluation.reconstruction import Moments, frechet_distance, ssim


def _moments(features: torch.Tensor, parts: int = 1) -> Moments:
    found = Moments()
    for part in features.tensor_split(parts):
        found.add(part)
    return found


def test_ssim_agrees_with_torchmetrics() -> None:
    """Our index is the published one: another implementation gives the same map, of which we leave the border out."""
    from torchmetrics.functional import image as functional

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(3, 3, 24, 20, generator=generator) * 2 - 1
    ours = (real + 0.3 * torch.randn(real.shape, generator=generator)).clamp(-1, 1)
    _, theirs = functional.structural_similarity_index_measure(
        (ours + 1) / 2, (real + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = theirs[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert torch.allclose(ssim(ours, real).float(), inside, atol=1e-4)


def test_ssim_of_equal_pictures_and_wrong_shapes() -> None:
    """Equal pictures score 1; shapes that cannot be compared are errors that name both."""
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(ssim(picture, picture), torch.ones(2, dtype=torch.double))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(picture, picture[:1])
    with pytest.raises(ValueError, match="smaller than the window of 11"):
        ssim(picture[..., :8, :8], picture[..., :8, :8])


def test_frechet_distance_of_known_moments() -> None:
    """For independent features the distance is the sum of (mean difference)^2 + (deviation difference)^2."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.double)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(base.t().cov())).t()  # exactly N(0, 1)
    ours, real = base * torch.tensor([2.0, 1.0, 3.0]) + torch.tensor([1.0, 0.0, -2.0]), base
    assert frechet_distance(_moments(ours, 7), _moments(real)) == pytest.approx(5.0 + (1.0 + 0.0 + 4.0), rel=1e-9)
    assert frechet_distance(_moments(real), _moments(real, 3)) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_agrees_with_torchmetrics() -> None:
    """On correlated features, torchmetrics with the same injected extractor gives the same figure."""
    from torchmetrics.image import fid

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures.double().flatten(1)

    generator = torch.Generator().manual_seed(1)
    real = torch.rand(200, 3, 2, 2, generator=generator)
    ours = (real.roll(1, 1) * 0.7 + 0.3 * torch.rand(real.shape, generator=generator)).clamp(0, 1)
    metric = fid.FrechetInceptionDistance(feature=Flat(), normalize=False)
    metric.update(real, real=True)
    metric.update(ours, real=False)
    found = frechet_distance(_moments(ours.flatten(1)), _moments(real.flatten(1)))
    assert found == pytest.approx(float(metric.compute()), rel=1e-4, abs=1e-6)


def test_frechet_distance_needs_two_pictures() -> None:
    """A covariance of one picture is none."""
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(_moments(torch.zeros(1, 3)), _moments(torch.zeros(5, 3)))
