"""Distances of pictures as a network sees them: LPIPS, or the layers of the tower's own initial image encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from vilau.errors import first_line
from vilau.modeling.vision_tower import VisionTower

_VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
_TAPS = (2, 4, 7, 10, 13)  # LPIPS looks after the last convolution of each resolution
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation for [-1, 1]
_CONV = re.compile(r"^(?:net\.slice\d\.|features\.)(\d+)\.(weight|bias)$")
_WEIGHING = re.compile(r"^(?:lpips\.)?lin(\d)\.model\.1\.weight$")


class SiglipDistance(nn.Module):
    """Mean squared distance of normalised hidden states of a frozen copy of the image encoder, as it is now.

    Each position's state is scaled to length 1; the squared distances are summed over channels and averaged over
    positions and layers.

    Args:
        tower: with a SigLIP image encoder.
        layers: numbers of layers, 1 being the first; four evenly spaced ones up to the last but one if empty.

    Raises:
        ValueError: the tower has a convolutional encoder, or not so many layers.
    """

    def __init__(self, tower: VisionTower, layers: Sequence[int] = ()) -> None:
        super().__init__()
        if tower.pixel_encoder is not None:
            raise ValueError(
                "perceptual 'siglip' compares layers of a SigLIP encoder, and encoder_type 'conv' has none; use "
                "'lpips' or 'none'"
            )
        every = tower.image_encoder.encoder.layers
        usable = max(1, len(every) - 1)
        self.chosen = sorted(set(layers) or {max(1, round(usable * part / 4)) for part in range(1, 5)})
        if self.chosen[0] < 1 or self.chosen[-1] > len(every):
            raise ValueError(f"perceptual_layers {list(layers)} must lie in 1 to {len(every)}, the encoder's layers")
        self.embeddings = copy.deepcopy(tower.image_encoder.embeddings)
        self.layers = copy.deepcopy(nn.ModuleList(every[: self.chosen[-1]]))
        self.requires_grad_(False).eval()

    def features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Return normalised states ``(I, P, W)`` of each chosen layer for pictures ``(I, 3, S, S)`` in [-1, 1]."""
        hidden = self.embeddings(pixel_values)
        found = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, None)
            if number in self.chosen:
                found.append(F.normalize(hidden.float(), dim=-1))
        return found

    def forward(self, drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the distance ``(I,)`` of each pair of pictures ``(I, 3, S, S)``; no gradient for `target`."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(drawn), wanted, strict=True)
        return torch.stack([(a - b).square().sum(-1).mean(1) for a, b in pairs]).mean(0)


class LpipsDistance(nn.Module):
    """LPIPS with VGG16 (Zhang et al. 2018): weighted squared distances of normalised features of five resolutions.

    The network is our own and takes published weights by their names, so neither torchvision nor lpips is needed where
    the weights are local files.

    Args:
        weights: files of the weights (``.pth`` or ``.safetensors``) that together have the VGG16 of torchvision
            (``features.N.*``) and LPIPS' weighings (``linN.model.1.weight``), or the state dict of ``lpips.LPIPS``;
            if empty, they come from the packages lpips and torchvision.

    Raises:
        ValueError: no files are named and the packages are missing; a file cannot be read or has other weights.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weights: Sequence[str | Path] = ()) -> None:
        super().__init__()
        widths = [width for width in _VGG16 if isinstance(width, int)]
        inputs = [3, *widths[:-1]]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths, strict=True))
        self.weighings = nn.ParameterList(torch.zeros(widths[tap - 1]) for tap in _TAPS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self._load(weights)
        self.requires_grad_(False).eval()

    def _load(self, weights: Sequence[str | Path]) -> None:
        given = _from_files(weights) if weights else _from_packages()
        source = ", ".join(map(str, weights)) or "the package lpips"
        places: dict[str, nn.Parameter] = {}
        number, convs = 0, iter(self.convs)
        for layer in _VGG16:  # torchvision counts a convolution, its activation and a pooling as one layer each
            if layer == "pool":
                number += 1
                continue
            for name, parameter in next(convs).named_parameters():
                places[f"features.{number}.{name}"] = parameter
            number += 2
        places |= {f"lin{number}.model.1.weight": part for number, part in enumerate(self.weighings)}
        for name, place in places.items():
            if name not in given:
                raise ValueError(f"LPIPS needs the weight {name!r}, which {source} has not; see docs/tower.md")
            if given[name].numel() != place.numel():
                raise ValueError(
                    f"LPIPS needs {name!r} of shape {tuple(place.shape)}, but {source} has {tuple(given[name].shape)}"
                )
            place.data.copy_(given[name].reshape(place.shape))

    def features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Return five maps ``(I, C, h, w)``, each place scaled to length 1."""
        x = (pixel_values - self.shift) / self.scale
        convs, found, done = iter(self.convs), [], 0
        for layer in _VGG16:
            if layer == "pool":
                x = F.max_pool2d(x, 2)
                continue
            x = F.relu(next(convs)(x))
            done += 1
            if done in _TAPS:
                found.append(x.float() * torch.rsqrt(x.float().square().sum(1, keepdim=True) + 1e-10))
        return found

    def forward(self, drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the distance ``(I,)`` of each pair of pictures ``(I, 3, S, S)``, S >= 16; no gradient for `target`."""
        with torch.no_grad():
            wanted = self.features(target)
        total = torch.zeros(len(drawn), device=drawn.device)
        for weighing, a, b in zip(self.weighings, self.features(drawn), wanted, strict=True):
            total = total + torch.einsum("ichw,c->ihw", (a - b).square(), weighing).mean((1, 2))
        return total


def _from_files(paths: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Return the weights of all files under torchvision's and LPIPS' names."""
    found: dict[str, torch.Tensor] = {}
    for path in map(Path, paths):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                found |= load_file(path)
            else:
                found |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the readers fail in many ways; the user needs the file's name
            reason = first_line(error)
            raise ValueError(f"lpips_weights: cannot read {path} ({reason})") from error
    return _renamed(found)


def _from_packages() -> dict[str, torch.Tensor]:
    try:
        import lpips
        import torchvision  # noqa: F401 - lpips takes the VGG16 from it
    except ImportError as error:
        raise ValueError(
            f"perceptual 'lpips' needs the package {error.name}, which is not installed: install lpips and "
            "torchvision, or name local weight files in lpips_weights (docs/tower.md), or use perceptual 'siglip'"
        ) from error
    return _renamed(lpips.LPIPS(net="vgg", verbose=False).state_dict())


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if conv := _CONV.match(name):
            named[f"features.{conv[1]}.{conv[2]}"] = tensor
        elif weighing := _WEIGHING.match(name):
            named[f"lin{weighing[1]}.model.1.weight"] = tensor
    return named


def build_perceptual(
    name: str, tower: VisionTower, layers: Sequence[int], weights: Sequence[str]
) -> SiglipDistance | LpipsDistance | None:
    """Return the distance called `name`: `siglip`, `lpips`, or `none`, which is no distance."""
    if name == "none":
        return None
    return SiglipDistance(tower, layers) if name == "siglip" else LpipsDistance(weights)
