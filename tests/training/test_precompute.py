"""Training from stored codes is training from pixels: same samples, same losses, same weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vilau.data.codes import CodeStore, StoreInfo
from vilau.data.sample import Sample
from vilau.data.sources.source import image_text
from vilau.model import VilaUForConditionalGeneration
from vilau.training.config import TrainConfig, load_config
from vilau.training.precompute import (
    CodePlan,
    build_stage_samples,
    check_codes,
    encoder_of,
    find_tower,
    frames_of,
    make_codes,
    plan_codes,
)
from vilau.training.run import build_stage, run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


def load(tmp_path: Path, *overrides: str) -> TrainConfig:
    """Stage `sft` of the debug configuration from the shipped model, three steps."""
    config = load_config(CONFIG, [f"output={tmp_path / 'run'}", "stages.sft.init_from=shipped", *overrides])
    return config.model_copy(update={"stages": {"sft": config.stages["sft"].model_copy(update={"steps": 3})}})


def write_codes(config: TrainConfig, out: Path) -> list[CodePlan]:
    """What `vilau data codes` does, its shards shared by two."""
    folder = find_tower(config, "sft")
    tower = VilaUForConditionalGeneration.from_pretrained(folder).vision_tower.eval()
    plans = plan_codes(config, "sft", tower, frames_of(config, folder), out)
    for plan in plans:
        for part in (1, 0):
            make_codes(plan, encoder_of(tower), part, 2)
        assert check_codes(plan, encoder_of(tower), 0.2) > 0
    return plans


def test_processes_that_arrive_at_any_moment_share_all_shards(tmp_path: Path) -> None:
    """Two real processes write each shard once, one after the other and at the same time, and each checks its own."""

    def squares(number: int) -> tuple[Sample, tuple[np.ndarray, ...]]:
        sample = image_text(f"p/{number}", np.full((8, 8, 3), number, np.uint8), f"number {number}")
        return sample, sample.frames

    def encode(frames: np.ndarray) -> np.ndarray:
        return frames[:, :2, :2, 0].astype(np.int64)

    def work(plan: CodePlan, part: int) -> None:
        written = make_codes(plan, encode, part, 2)
        checked = check_codes(plan, encode, 1.0, part, 2)
        os._exit(10 * written + (checked != len([n for n in range(10) if n // 2 % 2 == part])))

    def start(plan: CodePlan, part: int) -> int:
        child = os.fork()
        if not child:
            try:
                work(plan, part)
            finally:
                os._exit(1)
        return child

    def finish(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    info = StoreInfo("data", "tower", 2, 2, 16, samples=10, shard_size=2)
    for order in ("late", "together"):
        plan = CodePlan(tmp_path / order, info, squares)
        if order == "late":
            codes = [finish(start(plan, part)) for part in (1, 0)]
        else:
            codes = [finish(child) for child in [start(plan, part) for part in (1, 0)]]
        assert codes == [20, 30]
        assert [CodeStore(plan.folder)[n].id for n in range(10)] == [f"p/{n}" for n in range(10)]
    assert check_codes(plan, encode, 0.01, 1, 2) == 1  # not one of the spread samples is in its shards
    assert check_codes(plan, encode, 1.0, 7, 8) == 0  # more processes than shards


def with_codes(config: TrainConfig, out: Path) -> TrainConfig:
    """The same configuration with `stages.sft.codes`."""
    return config.model_copy(update={"stages": {"sft": config.stages["sft"].model_copy(update={"codes": str(out)})}})


def final_weights(config: TrainConfig) -> dict[str, Any]:
    """Train and return the weights."""
    model = VilaUForConditionalGeneration.from_pretrained(run(config, show_progress=False))
    return model.state_dict()


def test_nano_stage_from_codes_equals_from_pixels(tmp_path: Path) -> None:
    """A stage of the nano world trained from its stored samples ends in the same weights, bit for bit."""
    config = load(tmp_path)
    write_codes(config, tmp_path / "codes")
    pixels = final_weights(config)
    coded = with_codes(config.model_copy(update={"output": str(tmp_path / "coded")}), tmp_path / "codes")
    assert build_stage(coded, "sft", None).make_batch(0, 0, 1).frames.shape[0] == 0
    codes = final_weights(coded)
    assert all(np.array_equal(pixels[name], codes[name]) for name in pixels)
    other = coded.model_copy(update={"seed": 9})
    with pytest.raises(ValueError, match="holds other samples than this stage reads"):
        build_stage(other, "sft", None)


def test_a_nano_source_from_codes_equals_from_pixels(tmp_path: Path) -> None:
    """The nano world beside a folder: the same batches and losses from codes; codes of other settings are refused."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number * 40, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of {number}")
    nano = "{format: nano, samples: 30, forms: {text_image: 2, multi_image: 1, text_video: 1, text: 1}}"
    config = load(tmp_path, f"data.sources=[{nano}, {{format: folder, path: {folder}}}]", "stages.sft.mixture={}")
    write_codes(config, tmp_path / "codes")
    coded = with_codes(config, tmp_path / "codes")
    stages = [build_stage(one, "sft", None) for one in (config, coded)]
    for step in range(3):
        batches = [stage.make_batch(step, 0, 1) for stage in stages]
        assert batches[0].sample_ids == batches[1].sample_ids and "text" in batches[0].forms + batches[1].forms
        losses = []
        for stage, batch in zip(stages, batches, strict=True):
            stage.module.eval()
            losses.append(stage.compute(batch, step).loss.detach())
        assert losses[0] == losses[1]
    coded.data.sources[0].seed = 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="holds other samples than source 'nano' now gives"):
        build_stage(coded, "sft", None)


def test_codes_of_other_samples_are_refused(tmp_path: Path) -> None:
    """Other captions, filters or limits with as many samples, and a table that changed in place: neither training nor
    `vilau data codes` goes on. A copy elsewhere is the same, and so is a store of an earlier version."""
    folder, out = tmp_path / "pictures", tmp_path / "codes"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    table = folder / "captions.jsonl"
    table.write_text('{"file_name": "a.png", "caption": "all red", "title": "red", "score": 1}\n')
    model = VilaUForConditionalGeneration.from_pretrained(find_tower(load(tmp_path), "sft")).eval()
    tower = model.vision_tower

    def of(source: str = "", *overrides: str, place: Path = folder) -> TrainConfig:
        named = f"data.sources=[{{format: folder, path: {place}, name: p, {source}}}]"
        return with_codes(load(tmp_path, named, "stages.sft.mixture={}", *overrides), out)

    def make(config: TrainConfig, num_frames: int = int(model.config.num_frames)) -> int:
        (plan,) = plan_codes(config, "sft", tower, num_frames, out)
        return make_codes(plan, encoder_of(tower), 0, 1)

    def refused(config: TrainConfig, facts: str, why: str) -> None:
        with pytest.raises(ValueError, match=f"made with another {facts}: choose another folder"):
            make(config)
        with pytest.raises(ValueError, match=f"{why}.* run `vilau data codes` into a new folder"):
            build_stage_samples(config, "sft", model)

    assert make(of()) == 1 and make(of()) == 0
    build_stage_samples(of(), "sft", model)
    others = [of("caption_field: title"), of("filters: [score >= 1]"), of("", "data.max_pixels=2000")]
    for other in others:
        refused(other, "data", "other fields of the source")
    with pytest.raises(ValueError, match="made with another data"):
        make(of(), num_frames=3)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    assert make(of(place=copy)) == 0
    build_stage_samples(of(place=copy), "sft", model)

    (plan,) = plan_codes(of(), "sft", tower, int(model.config.num_frames), tmp_path / "none")
    facts = json.loads((out / "p" / "codes.json").read_text())
    facts.pop("files")
    former = [int(tower.config.image_size), int(model.config.num_frames), of().data.sources[0].content()]
    earlier = {**facts, "data": hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()}
    (out / "p" / "codes.json").write_text(json.dumps(earlier))
    assert make(of()) == 0
    build_stage_samples(of(), "sft", model)
    refused(others[0], "data, files", "other fields of the source")

    (out / "p" / "codes.json").write_text(json.dumps({**facts, "files": plan.info.files}))
    table.write_text(table.read_text().replace("all red", "all odd"))
    refused(of(), "files", "bytes of its files changed")


def test_sources_from_codes_equal_from_pixels(tmp_path: Path) -> None:
    """The same for a folder of pictures used both ways round, over several epochs; another tower is refused."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of {number}")
    forms = "{image_text: 1, text_image: 1}"
    source = f"data.sources=[{{format: folder, path: {folder}, forms: {forms}}}]"
    config = load(tmp_path, source, "stages.sft.mixture={pictures: 1}")
    write_codes(config, tmp_path / "codes")
    coded = with_codes(config, tmp_path / "codes")
    stages = [build_stage(one, "sft", None) for one in (config, coded)]
    for step in range(3):
        losses = []
        for stage in stages:
            stage.module.eval()
            losses.append(stage.compute(stage.make_batch(step, 0, 1), step).loss.detach())
        assert losses[0] == losses[1]
    fresh = load_config(CONFIG, [source, "stages.pretrain.mixture={pictures: 1}"])
    settings = fresh.stages["pretrain"].model_copy(update={"codes": str(tmp_path / "codes")})
    with pytest.raises(ValueError, match="made by another vision tower"):
        build_stage(fresh.model_copy(update={"stages": {"pretrain": settings}}), "pretrain", None)
