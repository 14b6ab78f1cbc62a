"""The pictures and texts by which a run is followed: of the right things, by the weights as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilau.cli.train_samples import NANO, Sampler
from vilau.training.config import TrainConfig, load_config
from vilau.training.run import build_stage

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


def load(*overrides: str) -> TrainConfig:
    """The debug configuration whose stage sft starts from the shipped model."""
    return load_config(CONFIG, ["stages.sft.init_from=shipped", *overrides])


def test_a_tower_shows_originals_and_reconstructions_by_depth(tmp_path: Path) -> None:
    """Eight pictures, and what the first 1 to D codes keep of them."""
    config = load()
    Sampler(config)(build_stage(config, "vision_tower", None), 7, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "step-0000007.png"))
    assert sheet.shape[1] >= 8 * 128 and sheet.shape[0] >= 5 * 128
    assert not list(tmp_path.glob("*.json"))


def test_a_model_of_the_nano_world_draws_films_and_answers(tmp_path: Path) -> None:
    """Set prompts and pictures: the shipped model names what it sees."""
    config = load()
    Sampler(config)(build_stage(config, "sft", None), 3, tmp_path)
    texts = json.loads((tmp_path / "step-0000003.json").read_text())
    first = texts["picture 1"]
    assert "dog" in first["caption"] and "dog" in first[NANO.questions[0]] and "green" in first[NANO.questions[1]]
    assert Image.open(tmp_path / "step-0000003.png").width > 8 * 128


@pytest.mark.parametrize("given", [False, True], ids=["found in the data", "configured"])
def test_own_data_is_shown_by_its_own_prompts(tmp_path: Path, given: bool) -> None:
    """Prompts are the data's own captions unless `samples` names others; nano prompts would say nothing about it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"all {colour}")
    source = f"data.sources=[{{format: folder, path: {folder}, forms: {{text_image: 1, image_text: 1}}}}]"
    chosen = ['samples.prompts=["a cat"]', f"samples.pictures=[{folder / '0.png'}]", 'samples.questions=["what?"]']
    config = load(source, "stages.sft.mixture={pictures: 1}", *(chosen if given else []))
    stage = build_stage(config, "sft", None)
    sampler = Sampler(config)
    assert set(sampler._wanted(stage).prompts) == ({"a cat"} if given else {"all red", "all green", "all blue"})
    sampler(stage, 1, tmp_path)
    texts = json.loads((tmp_path / "step-0000001.json").read_text())
    assert len(texts) == (1 if given else 4) and set(texts["picture 1"]) == (
        {"caption", "what?"} if given else {"caption"}
    )
