"""Operations that are counted by rule agree with those that the library counts while they happen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vilau.training.config import load_config
from vilau.training.flops import count_flops, peak_flops, tower_flops
from vilau.training.run import build_stage

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


@pytest.mark.parametrize("name", ["pretrain", "vision_tower"])
def test_the_rule_agrees_with_a_counted_step(name: str) -> None:
    """Forward and backward of a real batch: within 15 % of what the stage says, so that utilisation means something.

    The rule counts neither padding nor attention to positions that come later; the library counts both.
    """
    torch.manual_seed(0)
    stage = build_stage(load_config(CONFIG, ["output=/nowhere"]), name, None)
    batch = stage.make_batch(0, 0, 1)
    stage.train_mode()
    if name == "vision_tower":
        stage.compute(batch, 0)  # the codebook has begun: its k-means is no part of a step
    counted = count_flops(lambda: stage.compute(batch, 0).loss.backward())
    assert stage.work(batch)["flops"] == pytest.approx(counted, rel=0.15)


def test_the_tower_of_the_paper_is_counted_without_memory() -> None:
    """SigLIP-Large at 256 px: 2 operations per weight and position of its encoder, the search through 16384 codes."""
    import yaml

    from vilau.configuration import VilaUConfig

    raw = yaml.safe_load((CONFIG.parents[1] / "paper" / "vila-u-7b-256.yaml").read_text())
    found = tower_flops(VilaUConfig(**raw["model"]).vision_config)
    encoder = 23 * (4 * 1024**2 + 2 * 1024 * 4096) * 2 * 256
    attention = 23 * 4 * 1024 * 256**2
    search = 2 * 256 * 1024 * 16384 * 4
    assert found.encode == pytest.approx(encoder + attention + search, rel=0.02)


def test_a_cpu_has_a_measured_peak() -> None:
    """A figure that utilisation can be divided by: more than an abacus, less than a supercomputer."""
    assert 1e8 < peak_flops(torch.device("cpu"), bf16=False) < 1e14
