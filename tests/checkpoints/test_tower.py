"""The tower alone, from its own folder and out of whole models of both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vilau
from vilau.model import VilaUForConditionalGeneration


def same(tower: Any, other: Any) -> bool:
    """Whether two towers hold the same tensors under the same names."""
    one, two = tower.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_out_of_a_released_folder(released: Path, model: VilaUForConditionalGeneration) -> None:
    """A released checkpoint gives its tower, text encoder included, with the codes of the whole model's."""
    tower, info = vilau.VisionTower.from_pretrained(released, output_loading_info=True)
    assert not info["missing_keys"] and same(tower, model.vision_tower)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(tower.eval().encode(pixels), model.vision_tower.encode(pixels))


@pytest.mark.parametrize("changes", [{}, {"quantizer": "mcq", "depth": 2, "codebook_learning": "gradient"}])
def test_out_of_our_folder(make_model: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """Of a whole model in our layout, in one shard or several, the tower's tensors and configuration alone are used."""
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    tower = vilau.VisionTower.from_pretrained(tmp_path / "whole")
    assert isinstance(tower, vilau.VisionTower) and same(tower, model.vision_tower)
    tower.save_pretrained(tmp_path / "alone")
    again = vilau.VisionTower.from_pretrained(tmp_path / "alone")
    assert same(again, model.vision_tower) and again.config.quantizer == model.config.vision_config.quantizer
    half = vilau.VisionTower.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert half.logit_scale.dtype == torch.bfloat16
    assert torch.equal(half.quantizer.books(), model.vision_tower.quantizer.books())


def test_the_shipped_model_has_a_tower(shipped_model_dir: Path) -> None:
    """The shipped weights are stored in half precision, and compute in float32 as those of the whole model do."""
    tower = vilau.VisionTower.from_pretrained(shipped_model_dir).eval()
    whole = VilaUForConditionalGeneration.from_pretrained(shipped_model_dir).vision_tower.eval()
    assert tower.dtype == whole.dtype == torch.float32 and same(tower, whole)


def test_what_is_no_tower_is_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """A folder without a model, an unknown field, a missing tensor: named, and nothing is half-loaded."""
    with pytest.raises(ValueError, match="not a model of a known layout"):
        vilau.VisionTower.from_pretrained(tmp_path)
    make_model().vision_tower.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"codebook_sise": 16}))
    with pytest.raises(ValueError, match="'codebook_sise'; did you mean 'codebook_size'"):
        vilau.VisionTower.from_pretrained(tmp_path)
    file.write_text(json.dumps(stored | {"codebook_size": 17}))
    with pytest.raises(ValueError, match="do not fit config.json"):
        vilau.VisionTower.from_pretrained(tmp_path)
