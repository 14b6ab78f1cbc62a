"""Perceptual distances: the frozen initial encoder, and LPIPS from weight files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vilau.modeling.vision_tower import VisionTower
from vilau.training.perceptual import LpipsDistance, SiglipDistance, build_perceptual

VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
POOLS, TAPS = (4, 9, 16, 23), (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def tower(make_config: Callable[..., Any]) -> VisionTower:
    """A tower of 16 px whose image encoder has random weights."""
    torch.manual_seed(0)
    return VisionTower(make_config().vision_config)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random numbers in the shapes and under the names of torchvision's VGG16 and LPIPS' weighings."""
    generator = torch.Generator().manual_seed(0)
    named, before = {}, 3
    for number, width in VGG16.items():
        spread = (2 / (9 * before)) ** 0.5
        named[f"features.{number}.weight"] = torch.randn(width, before, 3, 3, generator=generator) * spread
        named[f"features.{number}.bias"] = torch.randn(width, generator=generator) * 0.1
        before = width
    for number, tap in enumerate(TAPS):
        named[f"lin{number}.model.1.weight"] = torch.rand(1, VGG16[tap], 1, 1, generator=generator)
    return named


@pytest.fixture(scope="module")
def file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as one file."""
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def pictures(seed: int, side: int = 16) -> torch.Tensor:
    """Two random pictures in [-1, 1]."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_siglip_distance(tower: VisionTower) -> None:
    """Zero for equal pictures, by the formula for others, its gradient only in what was drawn."""
    distance = SiglipDistance(tower, [1, 2])
    drawn, target = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    assert float(distance(target, target).detach().abs().max()) == 0
    found = distance(drawn, target)
    states = []
    for picture in (drawn, target):
        hidden = tower.image_encoder.embeddings(picture)
        for layer in tower.image_encoder.encoder.layers:
            hidden = layer(hidden, None)
            states.append(hidden / hidden.norm(dim=-1, keepdim=True))
    expected = [sum((states[n][i] - states[n + 2][i]).square().sum() / 4 / 2 for n in (0, 1)) for i in (0, 1)]
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(e) for e in expected]))
    found.sum().backward()
    assert drawn.grad is not None and drawn.grad.abs().sum() > 0
    assert target.grad is None and not any(p.requires_grad for p in distance.parameters())


def test_siglip_distance_keeps_the_initial_encoder(make_config: Callable[..., Any]) -> None:
    """It is a copy: what training does to the encoder does not move the measure."""
    tower = VisionTower(make_config().vision_config)
    distance = SiglipDistance(tower)
    before = distance(pictures(0), pictures(1))
    with torch.no_grad():
        for parameter in tower.image_encoder.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(distance(pictures(0), pictures(1)), before)


def test_siglip_distance_refuses(make_config: Callable[..., Any], tower: VisionTower) -> None:
    """Layers that are not there, and towers without such layers."""
    with pytest.raises(ValueError, match=r"perceptual_layers \[1, 3\] must lie in 1 to 2"):
        SiglipDistance(tower, [1, 3])
    with pytest.raises(ValueError, match="encoder_type 'conv' has none"):
        SiglipDistance(VisionTower(make_config(encoder_type="conv").vision_config))


def test_lpips_follows_its_formula(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Against a plain walk through VGG16 with stand-in weights; the published weights are not at hand here."""

    def look(x: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        x = (x - shift) / scale
        maps = []
        for number in range(29):
            if number in POOLS:
                x = nn.functional.max_pool2d(x, 2)
            elif number in VGG16:
                kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
                x = nn.functional.conv2d(x, kernel, bias, padding=1).clamp_min(0)
                if number in TAPS:
                    maps.append(x / x.norm(dim=1, keepdim=True).clamp_min(1e-6))
        return maps

    distance = LpipsDistance([file])
    drawn, target = pictures(0, 32).requires_grad_(), pictures(1, 32)
    pairs = zip(look(drawn.detach()), look(target), strict=True)
    expected = sum(
        (weights[f"lin{n}.model.1.weight"] * (a - b).square()).sum(1).mean((1, 2)) for n, (a, b) in enumerate(pairs)
    )
    found = distance(drawn, target)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert drawn.grad is not None and torch.isfinite(drawn.grad).all() and drawn.grad.abs().sum() > 0


def test_lpips_reads_the_modules_own_names(weights: dict[str, torch.Tensor], file: Path, tmp_path: Path) -> None:
    """The state dict of `lpips.LPIPS` and two separate files give the same weights as one file of torchvision names."""
    slices = [(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)]
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("features."):
            number = int(name.split(".")[1])
            which = next(i for i, (first, last) in enumerate(slices, 1) if first <= number < last)
            name = name.replace("features.", f"net.slice{which}.")
        renamed[name] = tensor
    torch.save(renamed, tmp_path / "whole.pth")
    parts = {"vgg": "features", "lin": "lin"}
    for part, start in parts.items():
        torch.save({n: t for n, t in weights.items() if n.startswith(start)}, tmp_path / f"{part}.pth")
    expected = LpipsDistance([file]).state_dict()
    for files in (["whole.pth"], ["vgg.pth", "lin.pth"]):
        found = LpipsDistance([tmp_path / name for name in files]).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_lpips_says_what_is_missing(file: Path, tmp_path: Path, tower: VisionTower) -> None:
    """No package, no file, half the weights: an error with the remedy."""
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ValueError, match="needs the package lpips, .* lpips_weights .* perceptual 'siglip'"):
            build_perceptual("lpips", tower, [], [])
    with pytest.raises(ValueError, match=r"lpips_weights: cannot read .*none\.pth"):
        LpipsDistance([tmp_path / "none.pth"])
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"lpips_weights: cannot read .*text\.pth"):
        LpipsDistance([tmp_path / "text.pth"])
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"needs the weight 'features.0.bias', which .*half\.pth has not"):
        LpipsDistance([tmp_path / "half.pth"])
    assert build_perceptual("none", tower, [], []) is None
    assert isinstance(build_perceptual("lpips", tower, [], [str(file)]), LpipsDistance)
