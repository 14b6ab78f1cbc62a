from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vilau.data.nano.world import ASSETS
from vilau.evaluation.tower_suite import load_tower, run_tower_suite


def test_a_whole_model_has_the_figures_of_its_tower(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The tower in a model and the same one alone score alike, again and again; without text encoder no zero-shot."""
    whole = run_tower_suite(tiny_model_dir, limit=8)
    load_tower(tiny_model_dir).save_pretrained(tmp_path / "tower")
    alone = run_tower_suite(tmp_path / "tower", limit=8)
    assert whole["metrics"] == alone["metrics"] == run_tower_suite(tiny_model_dir, limit=8)["metrics"]
    assert {"psnr", "ssim", "rfid_judge", "code_usage"} <= set(whole["metrics"]) and whole["chance"] == {}
    assert whole["samples"]["psnr"] == 8 and whole["protocol"]["extractor"] == "judge"


def test_a_released_folder_is_measured_as_it_is(root: Path) -> None:
    """A checkpoint of the published layout needs no conversion; without a tokenizer for captions, pictures alone."""
    released = root / "tests" / "golden" / "tiny256" / "ckpt"
    found = run_tower_suite(released, limit=2)
    assert found["samples"]["psnr"] == 2 and "zero_shot, retrieval" in found["left_out"]
    assert not any("zero_shot" in name or "retrieval" in name for name in found["metrics"])


def test_a_text_encoder_without_tokenizer_is_an_error(mini_cells: Path, tmp_path: Path) -> None:
    """Zero-shot figures need the captions' tokenizer beside the tower: its absence is told, not passed over."""
    from vilau.modeling.vision_tower import VisionTower
    from vilau.training.config import load_config
    from vilau.training.model_config import build_config, build_text_encoder_config

    config = load_config(mini_cells / "mini-align.yaml")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    sizes = build_config(config, tokenizer).vision_config
    sizes.text_encoder_config = build_text_encoder_config(config, tokenizer, sizes.hidden_size)
    VisionTower(sizes).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="no tokenizer"):
        run_tower_suite(tmp_path / "tower", limit=2)
    tokenizer.save_pretrained(tmp_path / "tower")
    assert "zero_shot_objects" in run_tower_suite(tmp_path / "tower", limit=2)["metrics"]
