"""How near reconstructions are to their pictures: structural similarity, and Fréchet distance of features."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_STABILISERS = (0.01**2, 0.03**2)  # the index's own constants for a peak of 1


def ssim(ours: torch.Tensor, real: torch.Tensor, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Return the structural similarity ``(N,)`` of pictures ``(N, 3, S, S)`` in [-1, 1] (Wang et al. 2004).

    Gaussian window of 11 pixels and deviation 1.5, per channel, only where the window lies inside the picture, the mean
    over channels and places; 1 for equal pictures.

    Raises:
        ValueError: the shapes differ, or the pictures are smaller than the window.
    """
    if ours.shape != real.shape:
        raise ValueError(f"pictures of the shapes {tuple(ours.shape)} and {tuple(real.shape)} cannot be compared")
    if min(ours.shape[-2:]) < window:
        raise ValueError(f"pictures of {tuple(ours.shape[-2:])} px are smaller than the window of {window} px")
    x, y = (ours.double().clamp(-1, 1) + 1) / 2, (real.double().clamp(-1, 1) + 1) / 2
    places = torch.arange(window, dtype=torch.double, device=x.device) - window // 2
    bell = torch.exp(-(places**2) / (2 * sigma**2))
    bell = (bell / bell.sum()).view(1, 1, 1, window)

    def blur(values: torch.Tensor) -> torch.Tensor:
        flat = values.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(flat, bell), bell.transpose(2, 3)).unflatten(0, values.shape[:2]).squeeze(2)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = _STABILISERS
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (light * (2 * covariance + c2) / (var_x + var_y + c2)).flatten(1).mean(1)


class Moments:
    """Mean and covariance of features, gathered part by part in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.products = torch.zeros(())

    def add(self, features: torch.Tensor) -> None:
        """Take in features ``(N, F)``."""
        values = features.detach().double().cpu()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.products = self.products + values.t() @ values

    def mean(self) -> torch.Tensor:
        """Return the mean ``(F,)``."""
        return self.total / self.count

    def covariance(self) -> torch.Tensor:
        """Return the unbiased covariance ``(F, F)``."""
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(ours: Moments, real: Moments) -> float:
    """Return the Fréchet distance of two normal distributions with these moments (Heusel et al. 2017).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``. With fewer pictures than features it is biased upwards: figures of
    different numbers of pictures, or of different extractors, do not compare.

    Raises:
        ValueError: one side has fewer than two pictures.
    """
    if min(ours.count, real.count) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 pictures a side, got {ours.count} and {real.count}")
    c1, c2 = ours.covariance(), real.covariance()
    root = _root(c1)
    crossed = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    apart = (ours.mean() - real.mean()).square().sum()
    return max(0.0, float(apart + c1.trace() + c2.trace() - 2 * crossed))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.t()
