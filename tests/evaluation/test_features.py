from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vilau.evaluation.features import load_extractor


class Script(torch.nn.Module):
    """Stands for an Inception export: uint8 in, features out when asked for them."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = pictures.float().mean((2, 3))
        return means if return_features else means.sum()


def test_a_torchscript_file_is_called_as_inception_exports_are(tmp_path: Path) -> None:
    """uint8 pictures, features asked for, the file's name in the figure's name."""
    torch.jit.script(Script()).save(str(tmp_path / "Inception-2015.pt"))
    extractor = load_extractor(tmp_path / "Inception-2015.pt")
    assert extractor.name == "inception_2015"
    pictures = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    assert extractor(pictures).tolist() == [[0.0] * 3, [255.0] * 3]


def test_the_shipped_judge_gives_features() -> None:
    """The default extractor: finite features of one width, the same for a picture alone and among others."""
    extractor = load_extractor()
    pictures = torch.rand(5, 3, 32, 32) * 2 - 1
    features = extractor(pictures)
    assert extractor.name == "judge" and features.ndim == 2 and bool(features.isfinite().all())
    assert torch.allclose(extractor(pictures[2:3]), features[2:3], atol=1e-5)


def test_what_is_no_extractor(tmp_path: Path) -> None:
    """A missing file, weights without code, and a script that gives no features are errors that say so."""
    with pytest.raises(ValueError, match="no feature extractor"):
        load_extractor(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be read as TorchScript"):
        load_extractor(tmp_path / "weights.pt")
    torch.jit.script(torch.nn.Flatten(0)).save(str(tmp_path / "flat.pt"))
    with pytest.raises(ValueError, match="it must give"):
        load_extractor(tmp_path / "flat.pt")(torch.zeros(2, 3, 4, 4))
