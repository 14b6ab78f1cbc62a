from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vilau.configuration import VisionTowerConfig
from vilau.data.nano.world import HELDOUT, World
from vilau.evaluation.tower import ValidationSet, ZeroShot, code_figures, measure_tower, retrieval
from vilau.evaluation.tower_data import nano_validation, pairs_validation
from vilau.modeling.codebook_usage import codebook_usage
from vilau.modeling.vision_tower import VisionTower


@pytest.fixture(scope="module")
def tower(make_config: Callable[..., Any]) -> VisionTower:
    """A small tower with a text encoder, in training mode."""
    torch.manual_seed(0)
    config: VisionTowerConfig = make_config().vision_config
    text = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "max_position_embeddings": 4, "projection_size": 32}
    fields = {**config.to_dict(), "text_encoder_config": {**text, **more, "bos_token_id": None, "eos_token_id": None}}
    return VisionTower(VisionTowerConfig(**fields)).train()


def _ids(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[len(text) % 16, 1, 2, 3] for text in texts])


def _pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_retrieval_counts_equal_captions_as_one() -> None:
    """Two pictures of the same caption are both right answers; a wrong neighbour is not."""
    images = torch.eye(3)
    texts = torch.stack([images[1], images[0], images[2]])
    assert retrieval(images, texts, ["a", "a", "b"]) == {"retrieval_image_to_text": 1.0, "retrieval_text_to_image": 1.0}
    found = retrieval(images, texts, ["a", "c", "b"])
    assert found["retrieval_image_to_text"] == pytest.approx(1 / 3)


def test_code_figures_count_by_depth_and_over_the_whole_book() -> None:
    """Usage and perplexity of codes that are known; one book for all depths or one for each."""
    codes = torch.tensor([[0, 5], [0, 5], [1, 5], [1, 5]])
    shared = code_figures(codebook_usage(codes, 8), shared=True)
    assert shared["code_usage"] == 3 / 8 and shared["usage_depth_1"] == 2 / 8
    assert shared["perplexity_depth_1"] == pytest.approx(2.0) and shared["perplexity_depth_2"] == pytest.approx(1.0)
    assert code_figures(codebook_usage(codes, 8), shared=False)["code_usage"] == 3 / 16


def test_figures_do_not_depend_on_the_batch_and_leave_the_tower_alone(tower: VisionTower) -> None:
    """Any chunk gives the same figures; mode, codebook and random state stay as they were."""
    tasks = (ZeroShot("things", _pictures(5), (0, 1, 0, 1, 1), (("a", "bb"), ("ccc",))),)
    data = ValidationSet("some", _pictures(6), tuple("abcabc"), tasks)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    state = torch.get_rng_state()
    one, other = (measure_tower(tower, data, _ids, chunk=size).metrics for size in (6, 4))
    assert tower.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    wanted = {"psnr", "ssim", "zero_shot_things", "retrieval_image_to_text", "retrieval_text_to_image", "code_usage"}
    assert wanted <= set(one) and "quantization_error" in one
    assert one == pytest.approx(other, rel=1e-4)


def test_what_cannot_be_measured_is_left_out(tower: VisionTower) -> None:
    """No texts: no zero-shot; not quantised: no codes and no reconstruction."""
    data = ValidationSet("some", _pictures(3), ("a", "b", "c"))
    assert not [name for name in measure_tower(tower, data).metrics if "retrieval" in name]
    aligned = measure_tower(tower, data, _ids, quantize=False, reconstruct=False).metrics
    assert set(aligned) == {"retrieval_image_to_text", "retrieval_text_to_image"}


def test_captions_that_repeat_are_classes() -> None:
    """Pairs of one's own are classified where captions repeat, as class names do, and only then."""
    frames = _pictures(6)
    data = pairs_validation("own", [(frame, f"a photo of a {word}") for frame, word in zip(frames, "xyxyxx")])
    assert data.tasks[0].wanted == (0, 1, 0, 1, 0, 0)
    assert data.tasks[0].prompts == (("a photo of a x",), ("a photo of a y",))
    assert pairs_validation("own", [(frame, word) for frame, word in zip(frames, "abcdef")]).tasks == ()


def test_nano_validation_shows_held_out_combinations_only() -> None:
    """What the classifications show was never trained on; every class has its prompts; a repeat is the same."""
    world = World.load(objects=6)
    data = nano_validation(world, 32, 20)
    again = nano_validation(world, 32, 20)
    assert np.array_equal(data.frames, again.frames) and data.captions == again.captions
    objects, colours = data.tasks
    pairs = {(world.names[a], world.colours[b]) for a, b in zip(objects.wanted, colours.wanted, strict=True)}
    assert pairs <= set(world.combinations(HELDOUT))
    assert [len(task.prompts) for task in data.tasks] == [6, 8]
    assert data.chance()["zero_shot_objects"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="at least 2"):
        nano_validation(world, 32, 1)
