"""Operations that are counted by rule agree with those that the library counts while they happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vilau.training.config import load_config
from vilau.training.flops import attention_flops, count_flops, peak_flops, tower_flops
from vilau.training.run import build_stage

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


@pytest.mark.parametrize("name", ["pretrain", "vision_tower"])
def test_the_rule_agrees_with_a_counted_step(name: str) -> None:
    """Forward and backward of a real batch: within 8 % of what the stage says, so that utilisation means something.

    The rule counts neither padding nor attention to later positions and other samples, both of which the library
    counts: that attention is added here.
    """
    torch.manual_seed(0)
    stage: Any = build_stage(load_config(CONFIG, ["output=/nowhere"]), name, None)
    batch = stage.make_batch(0, 0, 1)
    stage.train_mode()
    if name == "vision_tower":
        stage.compute(batch, 0)  # the codebook has begun: its k-means is no part of a step
    counted = count_flops(lambda: stage.compute(batch, 0).loss.backward())
    said = stage.work(batch)["flops"]
    if name == "pretrain":
        rows, length = batch.position_ids.shape
        seen = float((batch.position_ids[batch.form_ids >= 0] + 1).sum())
        said += attention_flops(stage._flops.width, stage._flops.layers, rows * length**2 - seen)
    assert said == pytest.approx(counted, rel=0.08)


def test_the_tower_of_the_paper_is_counted_without_memory() -> None:
    """SigLIP-Large at 256 px: 2 operations per weight and position of its encoder, the search through 16384 codes."""
    import yaml

    from vilau.configuration import VilaUConfig

    raw = yaml.safe_load((CONFIG.parents[1] / "paper" / "vila-u-7b-256.yaml").read_text())
    found = tower_flops(VilaUConfig(**raw["model"]).vision_config)
    encoder = 23 * (4 * 1024**2 + 2 * 1024 * 4096) * 2 * 256
    attention = 23 * 4 * 1024 * 256**2
    search = 2 * 256 * 1024 * 16384 * 4
    assert found.encode == pytest.approx(encoder + attention + search, rel=0.01)
    assert found.search == search


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted_by_hand_on_every_device(device: str) -> None:
    """Two products per pair of positions and channel, three times as much with the backward pass; also on a CPU."""
    heads, length, width = 4, 16, 8
    q, k, v = (torch.ones(2, heads, length, width, device=device, requires_grad=True) for _ in range(3))
    forward = 2 * heads * length**2 * width * 2 * 2  # two pictures; two products of two operations each
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 3 * forward


def test_a_frozen_encoder_and_the_search_are_counted_once() -> None:
    """Neither has a backward pass: counting one would make training look faster than it is."""
    torch.manual_seed(0)
    each = {}
    for trained in (True, False):
        config = load_config(CONFIG, ["output=/nowhere", f"stages.vision_tower.train_image_encoder={trained}"])
        stage: Any = build_stage(config, "vision_tower", None)
        each[trained] = stage.work(stage.make_batch(0, 0, 1))["flops"] / config.stages["vision_tower"].batch_size
    sizes = tower_flops(stage.tower.config)
    assert each[True] - each[False] == pytest.approx(2 * sizes.features)
    assert each[True] == pytest.approx(3 * (sizes.features + sizes.draw + sizes.embed) + sizes.search + sizes.text)


def test_a_cpu_has_a_measured_peak() -> None:
    """A figure that utilisation can be divided by: more than an abacus, less than a supercomputer."""
    assert 1e8 < peak_flops(torch.device("cpu"), bf16=False) < 1e14
