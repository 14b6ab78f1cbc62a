"""The real stages read the same samples whoever reads them, and a run checks what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.training.batches import step_batches
from vilau.training.config import TrainConfig, load_config
from vilau.training.run import build_stage, run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """The debug configuration, three steps a stage."""
    steps = [f"stages.{stage}.steps=3" for stage in ("align", "vision_tower", "pretrain", "sft")]
    return load_config(CONFIG, [f"output={tmp_path / 'run'}", *steps])


def batches(stage: Any, workers: int) -> list[Any]:
    """All batches that an engine would train on."""
    return [batch for (batch,), _ in step_batches(stage, 0, 1, workers)]


def test_sample_ids_have_one_global_order(config: TrainConfig) -> None:
    """R10: 0, 1 and 3 loader workers and 1, 2 and 4 processes read the same samples in the same order."""
    stage = build_stage(config, "sft", None)
    order = [batch.sample_ids for batch in batches(stage, 0)]
    assert [len(ids) for ids in order] == [16] * 3
    assert len({name for ids in order for name in ids}) == 48
    for workers in (1, 3):
        assert [batch.sample_ids for batch in batches(stage, workers)] == order
    for world in (2, 4):
        for step, ids in enumerate(order):
            shares = [stage.make_batch(step, rank, world).sample_ids for rank in range(world)]
            assert sum(shares, ()) == ids


def test_pictures_have_one_global_order(config: TrainConfig) -> None:
    """R10 for the tower: two processes together see the pictures and captions of one."""
    stage = build_stage(config, "align", None)
    whole = stage.make_batch(2, 0, 1)
    halves = [stage.make_batch(2, rank, 2) for rank in range(2)]
    for name in ("pixels", "text_ids", "captions"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))


def test_a_batch_that_does_not_divide_is_an_error(config: TrainConfig) -> None:
    """Three processes cannot share 16 samples evenly: said at once, with the remedy."""
    stage = build_stage(config, "align", None)
    with pytest.raises(ValueError, match="batch_size 16 does not divide by 3 processes"):
        stage.make_batch(0, 0, 3)


def test_a_run_without_stages_is_an_error(config: TrainConfig) -> None:
    """Nothing to train is a mistake of the configuration."""
    with pytest.raises(ValueError, match="no stages"):
        run(config.model_copy(update={"stages": {}}))


def test_a_missing_start_is_an_error(config: TrainConfig) -> None:
    """`init_from` must exist."""
    config.stages["align"].init_from = "/nowhere/at/all"
    with pytest.raises(ValueError, match="there is no folder /nowhere/at/all"):
        build_stage(config, "align", None)


def test_a_finished_stage_says_that_other_steps_have_no_effect(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Asking a finished stage for more steps does nothing, and says so with the folder to remove."""
    short = config.model_copy(update={"stages": {"align": config.stages["align"]}})
    result = run(short, show_progress=False)
    caplog.clear()
    longer = config.stages["align"].model_copy(update={"steps": 5})
    assert run(config.model_copy(update={"stages": {"align": longer}}), show_progress=False) == result
    assert "align is finished already, with 3 steps: 5 steps have no effect" in caplog.text
    assert str(result) in caplog.text
