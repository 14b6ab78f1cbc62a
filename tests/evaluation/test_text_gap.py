from __future__ import annotations

from pathlib import Path

import pytest

from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.world import World
from vilau.evaluation.subject import Subject
from vilau.evaluation.text_gap import shuffle_prompts, visual_cross_entropy
from vilau.pipeline import load


def test_every_sample_gets_a_prompt_for_something_else(world: World) -> None:
    """Shuffling keeps the pictures and never leaves a picture its own caption."""
    data = NanoDataset(world, {"text_image": 1.0}, "heldout", 1)
    samples = [data[i] for i in range(40)]
    captions = {sample.turns[0]: sample.meta["caption"] for sample in samples}
    for sample, mixed in zip(samples, shuffle_prompts(samples), strict=True):
        assert mixed.turns[1] is sample.turns[1]
        assert captions[mixed.turns[0]] != sample.meta["caption"]


def test_nothing_to_shuffle_is_no_figure(world: World) -> None:
    """One sample alone has no other prompt."""
    data = NanoDataset(world, {"text_image": 1.0}, "heldout", 1)
    assert shuffle_prompts([data[0]]) == []


def test_equals_the_loss_sample_by_sample(tiny_model_dir: Path, world: World) -> None:
    """The mean over packed rows is the mean over the samples one at a time: packing leaks nothing."""
    subject = Subject(load(tiny_model_dir, "cpu"))
    data = NanoDataset(world, {"text_image": 1.0}, "heldout", 1)
    samples = [data[i] for i in range(5)]
    together, shuffled = visual_cross_entropy(subject, samples)
    alone = [visual_cross_entropy(subject, [sample])[0] for sample in samples]
    assert together == pytest.approx(sum(alone) / 5, abs=1e-4)
    assert shuffled is not None and shuffled != together
