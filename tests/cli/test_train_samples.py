"""The pictures and texts by which a run is followed: of the right things, by the weights as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vilau.cli.train_samples import LONGEST, NANO, Found, Sampler
from vilau.data.sample import Sample, Turn, image, text
from vilau.processing.images import to_pixels
from vilau.training.config import TrainConfig, load_config
from vilau.training.precompute import encoder_of, make_codes, plan_codes
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


def pictures_in(folder: Path, broken: int = 0) -> str:
    """The override that names a folder of three captioned pictures, and of files that are none, as the only source."""
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"all {colour}")
    for number in range(broken):
        (folder / f"broken-{number}.png").write_bytes(b"no picture")
        (folder / f"broken-{number}.txt").write_text("nothing")
    return f"data.sources=[{{format: folder, path: {folder}, forms: {{text_image: 1, image_text: 1}}, epochs: 2}}]"


def few_steps(source: str) -> list[str]:
    """Of a stage of one step."""
    return [source, "stages.sft.mixture={}", "stages.sft.steps=1", "stages.sft.batch_size=4"]


def first_words(sample: Sample) -> str:
    """What the user says first."""
    return next(" ".join(part.text for part in turn.parts if part.text) for turn in sample.turns if turn.role == "user")


def test_films_and_questions_are_found_in_the_data(tmp_path: Path) -> None:
    """Data with films and questions shows films for its own prompts and answers to its own questions, a few of each."""
    forms = "{text_image: 1, text_video: 1, question: 1, image_text: 1}"
    config = load(f"data.sources=[{{format: nano, forms: {forms}}}]", "stages.sft.mixture={}", "stages.sft.jitter=0")
    stage, sampler = build_stage(config, "sft", None), Sampler(config)
    wanted = sampler._wanted(stage)
    assert len(wanted.prompts) == 8 and len(wanted.films) == len(wanted.questions) == 2
    samples = [stage.source[number] for number in range(64)]
    said = {
        form: {first_words(sample) for sample in samples if sample.form == form} for form in ("text_video", "question")
    }
    assert set(wanted.films) <= said["text_video"] and set(wanted.questions) <= said["question"]
    sampler(stage, 1, tmp_path)
    texts = json.loads((tmp_path / "step-0000001.json").read_text())
    assert len(texts) == 4 and all(set(one) == {"caption", *wanted.questions} for one in texts.values())
    assert np.asarray(Image.open(tmp_path / "step-0000001.png")).shape[0] >= (1 + 1 + 1) * 128


def test_long_questions_are_left_out() -> None:
    """One that is a page of instructions would fill the model's context, and the sheet."""
    found, picture = Found(), image(np.zeros((4, 4, 3), np.uint8))
    for number, words in enumerate(("why? " * LONGEST, "why?", "how?", "why?", "when?")):
        turns = (Turn("user", (picture, text(words))), Turn("assistant", (text("so"),)))
        found.add(Sample(str(number), "question", turns))
    assert list(found.questions) == ["why?", "how?"] and len(found.frames) == 4


def test_codes_are_shown_as_the_tower_decodes_them(tmp_path: Path) -> None:
    """A run from stored codes reads no picture; it describes what the codes keep of them."""
    source = pictures_in(tmp_path / "pictures")
    config = load(*few_steps(source))
    tower = build_stage(config, "sft", None).model.vision_tower
    for plan in plan_codes(config, "sft", tower, 4, tmp_path / "codes"):
        make_codes(plan, encoder_of(tower), 0, 1)
    coded = load(*few_steps(source), f"stages.sft.codes={tmp_path / 'codes'}")
    stage, sampler = build_stage(coded, "sft", None), Sampler(coded)
    pixels = [np.asarray(picture) for picture in sampler._pictures(stage)]
    plain = [np.asarray(picture) for picture in Sampler(config)._pictures(build_stage(config, "sft", None))]
    assert len(pixels) == len(plain) == 4
    for shown, original in zip(pixels, plain, strict=True):
        kept = tower.decode(torch.from_numpy(encoder_of(tower)(original[None].copy())))
        assert np.array_equal(shown, to_pixels(kept.numpy())[0])
    sampler(stage, 1, tmp_path)
    texts = json.loads((tmp_path / "step-0000001.json").read_text())
    assert len(texts) == 4 and all("caption" in one for one in texts.values())


def test_looking_at_the_data_is_not_counted_as_training_on_it(tmp_path: Path) -> None:
    """Bad samples met on the way would else enter the run's share of skipped ones, which can end it; and a source of
    few samples is looked at to its end."""
    config = load(*few_steps(pictures_in(tmp_path / "pictures", broken=5)))
    stage = build_stage(config, "sft", None)
    assert stage.source.mixture.total < 64
    stage.make_batch(0, 0, 1)
    met = stage.source.mixture._skips.copy()
    assert sum(met.values()) > 0
    sampler = Sampler(config)
    assert sampler._wanted(stage).prompts and len(sampler._pictures(stage)) == 4
    assert stage.take_skips() == met
