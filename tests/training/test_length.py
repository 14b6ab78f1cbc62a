"""A stage's length by tokens or epochs: close to what is trained on, the same for any number of processes, and kept."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.processes import in_two_processes
from vilau.training.batches import step_batches
from vilau.training.config import LanguageStageConfig, StageConfig, TrainConfig, load_config
from vilau.training.engine import StopRequested
from vilau.training.length import LENGTH_FILE, settle_length, spread_numbers, steps_of_epochs, steps_of_tokens
from vilau.training.precompute import encoder_of, make_codes, plan_codes
from vilau.training.run import Hooks, build_stage, run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
SMALL = ("threads=1", "log_every=1", "loggers=[]", "sample_every=1000", "validate_every=0")


def load(output: Path, name: str, *overrides: str, sources: Any = None) -> TrainConfig:
    """One stage of the debug configuration, of sources with their own weights if there are any."""
    own = [f"data.sources={json.dumps(sources)}", f"stages.{name}.mixture={{}}"] if sources else []
    config = load_config(CONFIG, [f"output={output}", *SMALL, *own, *overrides])
    return config.model_copy(update={"stages": {name: config.stages[name]}})  # type: ignore[literal-required]


def trained_tokens(stage: Any) -> int:
    """Positions without padding of all the batches of a stage."""
    return sum(int((batch.form_ids >= 0).sum()) for (batch,), _ in step_batches(stage, 0, 1, 0))


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    """A source of 40 pictures with long captions, read twice at most."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (40, 30), (number * 6, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red apple on a blue background " * (1 + number % 9))
    return {"format": "folder", "path": str(folder), "epochs": 2, "weight": 3}


def test_numbers_are_spread_over_the_whole_range() -> None:
    """One number of each stretch, all of them where there are few, the same again for the same seed."""
    assert spread_numbers(7, 10, 1) == list(range(7))
    numbers = spread_numbers(1000, 100, 1)
    assert [number // 10 for number in numbers] == list(range(100))
    assert numbers == spread_numbers(1000, 100, 1) != spread_numbers(1000, 100, 2)


@pytest.mark.parametrize("tokens", [3_000, 60_000, 20_000_000])
def test_samples_that_change_on_the_way_are_foreseen(tokens: int) -> None:
    """Short samples that are used up early do not mislead: the whole part that is read is measured."""

    def length_of(number: int) -> int:
        return 10 + number % 7 if number < 1000 else 40 + number % 31

    settings = LanguageStageConfig(tokens=tokens, batch_size=8)
    found = steps_of_tokens(settings, length_of, None, 128, seed=3)
    lengths = np.array([length_of(number) for number in range(found.steps * 8)])
    assert abs(lengths.sum() - tokens) < max(0.02 * tokens, 4 * 70)


def test_epochs_are_what_the_sources_hold() -> None:
    """Whole steps in so many epochs, rounded down, at least one."""
    for epochs, steps in ((1, 20), (2, 40), (0.5, 10), (0.001, 1)):
        assert steps_of_epochs(StageConfig(epochs=epochs, batch_size=40), 810).steps == steps


@pytest.mark.parametrize(("name", "tokens"), [("pretrain", 60_000), ("sft", 100_000)])
def test_tokens_of_the_nano_world(name: Any, tokens: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The stage that results trains on as many tokens as were asked for, within 3 %, and says how many steps that is"""
    caplog.set_level(logging.INFO)
    config = load(tmp_path, name, f"stages.{name}.tokens={tokens}")
    stage = build_stage(config, name, None)
    assert trained_tokens(stage) == pytest.approx(tokens, rel=0.03)
    steps = stage.config.num_steps
    assert f"{name}: {tokens:,} tokens are about {steps:,} steps of 16 samples (" in caplog.text
    kept = json.loads((tmp_path / name / LENGTH_FILE).read_text())
    assert (kept["steps"], kept["tokens"], kept["batch_size"]) == (steps, tokens, 16)


def test_tokens_of_sources_with_and_without_codes(pictures: dict[str, Any], tmp_path: Path) -> None:
    """A source that is used up on the way counts as long as it lasts; stored codes have the lengths of pixels."""
    sources = [pictures, {"format": "nano", "samples": 50, "forms": {"text": 1, "text_video": 1}}]
    config = load(tmp_path / "pixels", "pretrain", "stages.pretrain.tokens=15000", sources=sources)
    stage = build_stage(config, "pretrain", None)
    assert stage.config.num_steps > 10
    assert trained_tokens(stage) == pytest.approx(15_000, rel=0.04)
    assert stage.take_skips() == {}
    out = tmp_path / "codes"
    for plan in plan_codes(config, "pretrain", stage.model.vision_tower.eval(), 4, out):  # type: ignore[attr-defined]
        make_codes(plan, encoder_of(stage.model.vision_tower), 0, 1)  # type: ignore[attr-defined]
    coded = load(
        tmp_path / "coded", "pretrain", "stages.pretrain.tokens=15000", f"stages.pretrain.codes={out}", sources=sources
    )
    torch.manual_seed(config.seed)
    stage.model.vision_tower.save_pretrained(tmp_path / "tower")  # type: ignore[attr-defined]
    coded.stages["pretrain"].init_from = str(tmp_path / "tower")
    assert build_stage(coded, "pretrain", None).config.num_steps == stage.config.num_steps


@pytest.mark.parametrize("name", ["align", "pretrain"])
def test_epochs_of_sources(name: Any, pictures: dict[str, Any], tmp_path: Path) -> None:
    """Two epochs of 40 pictures and 56 nano samples, whatever their weights; of a stage's mixture if it has one."""
    sources = [pictures, {"format": "nano", "samples": 56}]
    config = load(tmp_path, name, f"stages.{name}.epochs=2", sources=sources)
    assert build_stage(config, name, None).config.steps == 12
    alone = load(tmp_path / "b", name, f"stages.{name}.epochs=1.5", sources=sources)
    alone.stages[name].mixture = {"nano": 1}  # type: ignore[literal-required]
    assert build_stage(alone, name, None).config.steps == 5
    many = load(tmp_path / "c", name, f"stages.{name}.epochs=3", sources=[pictures])
    with pytest.raises(ValueError, match="reads 7 steps x 16 = 112 samples, but its sources give 80"):
        build_stage(many, name, None)


def test_one_and_two_processes_have_one_length(tmp_path: Path) -> None:
    """R8, R10: the first process works it out and the others take it; a mistake ends all of them with its reason."""

    def steps(folder: str) -> Callable[[int], int]:
        config = load(tmp_path / folder, "pretrain", "stages.pretrain.tokens=20000")
        return lambda rank: build_stage(config, "pretrain", None).config.num_steps

    alone = steps("one")(0)
    assert in_two_processes(steps("two")) == (alone, alone)

    def fails(rank: int) -> str:
        def work_out() -> Any:
            raise ValueError("no such thing")

        with pytest.raises(ValueError, match="no such thing"):
            settle_length(load(tmp_path / "bad", "pretrain", "stages.pretrain.tokens=9"), "pretrain", work_out)
        return "told"

    assert in_two_processes(fails) == ("told", "told")


def test_a_resumed_run_keeps_its_length(pictures: dict[str, Any], tmp_path: Path) -> None:
    """R1: pictures that are added while a run is stopped do not change its schedule; another length given does."""
    config = load(tmp_path / "run", "align", "stages.align.epochs=1", "stages.align.batch_size=8", sources=[pictures])

    def stop(stage: str, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        run(config, Hooks(on_step=stop), show_progress=False)
    folder = Path(pictures["path"])
    for number in range(40, 80):
        for ending in ("png", "txt"):
            (folder / f"{number}.{ending}").write_bytes((folder / f"{number - 40}.{ending}").read_bytes())
    longer = load(tmp_path / "run", "align", "stages.align.epochs=2", "stages.align.batch_size=8", sources=[pictures])
    assert build_stage(longer.model_copy(update={"output": str(tmp_path / "new")}), "align", None).config.steps == 20
    result = run(config, show_progress=False)
    assert json.loads((result / "training.json").read_text())["steps"] == 5


def test_what_is_kept_is_for_one_length_and_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept steps hold under other settings, not under another length or batch size; a damaged file is made anew."""
    caplog.set_level(logging.INFO)
    tokens = "stages.pretrain.tokens=5000"
    steps = build_stage(load(tmp_path, "pretrain", tokens), "pretrain", None).config.num_steps
    again = load(tmp_path, "pretrain", tokens, "stages.pretrain.mixture={text_video: 1}")
    assert build_stage(again, "pretrain", None).config.steps == steps
    assert f"pretrain: 5,000 tokens: {steps} steps, as worked out before" in caplog.text
    larger = load(tmp_path, "pretrain", tokens, "stages.pretrain.batch_size=32")
    assert build_stage(larger, "pretrain", None).config.num_steps == pytest.approx(steps / 2, abs=1)
    (tmp_path / "pretrain" / LENGTH_FILE).write_text('{"steps": ')
    assert build_stage(load(tmp_path, "pretrain", tokens), "pretrain", None).config.steps == steps
    assert (
        build_stage(load(tmp_path, "pretrain", tokens, "stages.pretrain.steps=4"), "pretrain", None).config.steps == 4
    )


def test_a_finished_stage_of_tokens_is_known_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same length again is nothing to warn of; another one is, in its own words."""
    caplog.set_level(logging.INFO)
    config = load(tmp_path / "run", "pretrain", "stages.pretrain.tokens=1500")
    run(config, show_progress=False)
    caplog.clear()
    run(config, show_progress=False)
    assert "pretrain is finished already" in caplog.text and "no effect" not in caplog.text
    run(load(tmp_path / "run", "pretrain", "stages.pretrain.tokens=9000"), show_progress=False)
    assert "9,000 tokens have no effect" in caplog.text


def test_the_end_says_how_many_tokens_there_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The line at the end of a stage has the tokens that were in fact trained on."""
    config = load(tmp_path / "run", "pretrain", "stages.pretrain.tokens=1500")
    run(config)
    tokens = trained_tokens(build_stage(config, "pretrain", None))
    assert f"steps, {tokens:,} tokens in" in capfd.readouterr().err


def test_codes_of_the_nano_world_need_steps(tmp_path: Path) -> None:
    """Without a source there is no telling how many samples to encode: said with both remedies."""
    config = load(tmp_path, "sft", "stages.sft.tokens=5000")
    tower = build_stage(load(tmp_path / "b", "sft"), "sft", None).model.vision_tower  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"say stages.sft.steps=N here, or name the nano world under data.sources"):
        plan_codes(config, "sft", tower, 4, tmp_path / "codes")
