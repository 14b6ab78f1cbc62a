"""Stages `align` and `vision_tower`: batches, who learns, that they learn, what they save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modeling.processes import in_two_processes
from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import OptimizerConfig, TowerStageConfig
from vilau.training.optimizers import build_optimizers, lr_share, set_lr
from vilau.training.vision_tower import TowerStage, count_used, encode_captions, freeze, local_numbers, to_pixel_values

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "gray": (128, 128, 128)}
LENGTH = 6


class Halves:
    """Pictures whose left and right halves have a colour each, a little noise, and captions that say so."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        generator = np.random.default_rng(index)
        left, right = generator.choice(list(COLOURS), 2)
        pixels = np.empty((16, 16, 3), np.float32)
        pixels[:, :8], pixels[:, 8:] = COLOURS[left], COLOURS[right]
        pixels += generator.normal(0, 8, pixels.shape)
        return pixels.clip(0, 255).astype(np.uint8), f"{left} {right}"


@pytest.fixture
def make_stage(
    make_config: Callable[..., Any], tokenizer: Any, caption_encoder: dict[str, Any]
) -> Callable[..., TowerStage]:
    """A function that returns a stage over `Halves` with a small tower."""
    text = caption_encoder | {"max_position_embeddings": LENGTH}

    def build(
        name: str,
        tower: VisionTower | None = None,
        tower_fields: dict[str, Any] | None = None,
        **settings: Any,
    ) -> TowerStage:
        torch.manual_seed(0)
        if tower is None:
            kind = {"text_encoder_config": text, "stem": "conv", "zero_init_residual": True, "codebook_size": 32}
            config = make_config(**kind | (tower_fields or {}))
            tower = VisionTower(config.vision_config)
        optimizer = OptimizerConfig(lr=3e-3, warmup_steps=3)
        stage = TowerStageConfig(**({"steps": 30, "batch_size": 16, "optimizer": optimizer} | settings))
        return TowerStage(name, stage, tower, Halves(), tokenizer, LENGTH)

    return build


def train(stage: TowerStage, steps: int) -> list[dict[str, float]]:
    """Plain training; returns the figures of every step."""
    optimizers = build_optimizers(stage.module, stage.config.optimizer)
    figures = []
    for step in range(steps):
        stage.train_mode()
        set_lr(optimizers, lr_share(step, steps, stage.config.optimizer))
        for optimizer in optimizers:
            optimizer.zero_grad()
        result = stage.compute(stage.make_batch(step, 0, 1), step)
        result.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        figures.append({name: float(torch.as_tensor(a).detach()) / float(b) for name, (a, b) in result.sums.items()})
        figures[-1]["loss"] = float(result.loss.detach())
    return figures


def mean(figures: list[dict[str, float]], name: str) -> float:
    """Mean of a figure over some steps."""
    return sum(figure[name] for figure in figures) / len(figures)


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    """Names of parameters and buffers that are no longer what they were."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_align_learns_the_contrast(make_stage: Callable[..., TowerStage], kind: str) -> None:
    """30 steps lower the contrastive loss and raise retrieval; quantizer and decoder stay as they were."""
    stage = make_stage("align", contrastive=kind)
    before = snapshot(stage.tower)
    figures = train(stage, 30)
    assert mean(figures[-5:], "contrast") < 0.8 * mean(figures[:3], "contrast")
    assert mean(figures[-5:], "retrieval") > mean(figures[:3], "retrieval")
    assert {"pixel", "psnr", "commitment"}.isdisjoint(figures[0])
    moved = changed(before, stage.tower)
    assert not any(name.startswith(("quantizer.", "pixel_decoder.")) for name in moved)
    for part in ("image_encoder.embeddings", "text_encoder.", "to_code", "from_code", "image_encoder.head"):
        assert any(name.startswith(part) for name in moved), part


def test_vision_tower_learns_to_draw(make_stage: Callable[..., TowerStage]) -> None:
    """Eq. (1): PSNR rises by over 2 dB in 40 steps, with the contrast still in the loss; the text encoder is frozen."""
    stage = make_stage(
        "vision_tower",
        tower_fields={"code_dim": None, "stem": "patch", "zero_init_residual": False},  # the quickest to draw
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3),
        contrastive="softmax",
        contrastive_weight=0.1,
        pixel_weight=4.0,
    )
    tower = stage.tower
    before = snapshot(tower)
    figures = train(stage, 40)
    assert mean(figures[-5:], "psnr") > mean(figures[:3], "psnr") + 2
    assert mean(figures[-5:], "codes_used") > 4
    for figure in figures[:2]:
        parts = 0.1 * figure["contrast"] + 4.0 * figure["pixel"] + 0.25 * figure["commitment"]
        assert figure["loss"] == pytest.approx(parts, rel=1e-4)
    moved = changed(before, tower)
    assert not any(name.startswith("text_encoder.") for name in moved)
    for part in ("image_encoder.encoder.layers.0", "image_encoder.encoder.layers.1", "pixel_decoder."):
        assert any(name.startswith(part) for name in moved), part
    assert {"quantizer.codebook", "quantizer.ema_count", "quantizer.ema_sum"} <= moved


def test_failing_recipes_are_configurations(make_stage: Callable[..., TowerStage]) -> None:
    """Appendix C: (3) a frozen image encoder and (4) a trainable text encoder, by configuration alone."""
    stage = make_stage("vision_tower", train_image_encoder=False)
    before = snapshot(stage.tower)
    train(stage, 2)
    moved = changed(before, stage.tower)
    frozen = ("image_encoder.embeddings", "image_encoder.encoder.layers.0.", "to_code", "text_encoder.")
    assert not any(name.startswith(frozen) for name in moved)
    stage = make_stage("vision_tower", train_text_encoder=True)
    before = snapshot(stage.tower)
    train(stage, 2)
    assert any(name.startswith("text_encoder.") for name in changed(before, stage.tower))


def test_freeze_patterns(make_stage: Callable[..., TowerStage]) -> None:
    """`freeze` keeps what it names; a pattern that names nothing is a mistake and said so."""
    stage = make_stage("align", freeze=["logit_", r"embeddings\.patch"])
    before = snapshot(stage.tower)
    train(stage, 2)
    moved = changed(before, stage.tower)
    assert "logit_scale" not in moved and not any("embeddings.patch" in name for name in moved)
    with pytest.raises(ValueError, match="'no_such_part' matches no parameter"):
        freeze(stage.tower, ["no_such_part"])


def test_text_encoder_is_in_evaluation_mode_when_frozen(make_stage: Callable[..., TowerStage]) -> None:
    """A frozen text encoder must not be moved by dropout either."""
    stage = make_stage("vision_tower")
    stage.train_mode()
    assert stage.tower.training and not stage.tower.text_encoder.training
    stage = make_stage("align")
    stage.train_mode()
    assert stage.tower.text_encoder.training


def test_batches_are_a_function_of_the_step(make_stage: Callable[..., TowerStage]) -> None:
    """The same step gives the same batch; two processes together hold the batch of one, in rank order."""
    stage = make_stage("align")
    whole, again = stage.make_batch(3, 0, 1), stage.make_batch(3, 0, 1)
    assert torch.equal(whole.pixels, again.pixels) and torch.equal(whole.text_ids, again.text_ids)
    parts = [stage.make_batch(3, rank, 2) for rank in range(2)]
    together = sorted(pixels.numpy().tobytes() for part in parts for pixels in part.pixels)
    assert together == sorted(pixels.numpy().tobytes() for pixels in whole.pixels)
    assert not torch.equal(whole.pixels, stage.make_batch(4, 0, 1).pixels)
    twins = [(a, b) for a in range(16) for b in range(a)]
    same = [torch.equal(whole.text_ids[a], whole.text_ids[b]) for a, b in twins]
    assert same == [bool(whole.captions[a] == whole.captions[b]) for a, b in twins] and any(same)


def test_local_numbers_cover_the_batch_once() -> None:
    """Every sample of every step belongs to exactly one process; a batch that does not divide is refused."""
    for world in (1, 2, 3):
        numbers = [n for step in range(4) for rank in range(world) for n in local_numbers(step, 12, rank, world)]
        assert sorted(numbers) == list(range(48))
    with pytest.raises(ValueError, match="batch_size 12 does not divide by 5 processes; choose a multiple of 5"):
        local_numbers(0, 12, 0, 5)


def test_captions_are_cut_and_padded(tokenizer: Any) -> None:
    """Longer captions are cut, shorter ones padded on the right with the pad id; an empty one is padding."""
    ids = encode_captions(tokenizer, ["red", "red " * 50, ""], LENGTH)
    assert ids.shape == (3, LENGTH) and ids.dtype == torch.int64
    count = len(tokenizer("red", add_special_tokens=False)["input_ids"])
    assert (ids[0, count:] == tokenizer.pad_token_id).all() and (ids[1] != tokenizer.pad_token_id).all()
    assert (ids[2] == tokenizer.pad_token_id).all()


def test_a_caption_that_spells_a_special_token_stays_text(tokenizer: Any) -> None:
    """Captions are words of strangers: they never become marks of pictures or the end of the text."""
    special = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()))
    assert "<image_start>" in special
    ids = encode_captions(tokenizer, [f"a{token}b" for token in special], 40)
    found = set(ids.flatten().tolist()) & {tokenizer.convert_tokens_to_ids(token) for token in special}
    assert found <= {tokenizer.pad_token_id, tokenizer.unk_token_id}


def test_codes_in_use_are_counted_over_all_processes() -> None:
    """The figure is the same for one process and two: codes that both use count once."""
    codes = torch.tensor([[[0, 3], [3, 5]], [[5, 7], [7, 0]]])
    assert int(count_used(codes, 8)) == 4
    assert [int(count) for count in in_two_processes(lambda rank: count_used(codes[rank], 8))] == [4, 4]


def test_pixel_values() -> None:
    """uint8 (I, S, S, 3) -> [-1, 1] (I, 3, S, S): 0 is -1, 255 is 1."""
    frames = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    frames[0, 1, 2] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    values = to_pixel_values(frames)
    assert values.shape == (1, 3, 4, 4) and float(values.min()) == -1
    torch.testing.assert_close(values[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))


def test_a_tower_without_text_encoder_is_refused(make_config: Callable[..., Any], make_stage: Any) -> None:
    """Stage 1 cannot run without text: said before the first batch."""
    with pytest.raises(ValueError, match="text encoder"):
        make_stage("align", VisionTower(make_config().vision_config))


def test_result_loads(make_stage: Callable[..., TowerStage], tmp_path: Path) -> None:
    """The finished stage is a folder from which the next stage starts with the same tower and tokenizer."""
    stage = make_stage("align")
    stage.save_result(tmp_path)
    again = VisionTower.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in stage.tower.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(stage.tokenizer)


@pytest.mark.parametrize(
    "fields",
    [
        {"codebook_learning": "gradient"},
        {"quantizer": "mcq", "code_dim": 12},
        {"quantizer": "mcq", "code_dim": 12, "codebook_learning": "gradient", "code_noise": 0.1},
        {"quantizer": "none"},
    ],
)
def test_every_quantizer_trains(make_stage: Callable[..., TowerStage], fields: dict[str, Any]) -> None:
    """A few steps of stage 1 lower the loss and move the codebook, whichever quantizer the tower has."""
    stage = make_stage("vision_tower", tower_fields=fields, contrastive_weight=0.1)
    before = snapshot(stage.tower.quantizer)
    figures = train(stage, 12)
    assert mean(figures[-4:], "loss") < figures[0]["loss"] - 0.3
    moved = changed(before, stage.tower.quantizer)
    if fields.get("quantizer") == "none":
        assert not moved and "codes_used" not in figures[-1]
    else:
        assert ("map" if "codebook_learning" in fields else "ema_sum") in moved


def test_micro_batches_move_the_codebook_once(make_stage: Callable[..., TowerStage]) -> None:
    """With gradient accumulation the averages move with the last micro-batch of a step, for all of them."""
    stage = make_stage("vision_tower")
    stage.train_mode()
    stage.compute(stage.make_batch(0, 0, 1), 0)
    book = stage.tower.quantizer.codebook.clone()
    halves = stage.prepare([stage.make_batch(1, part, 2) for part in range(2)])
    stage.compute(halves[0], 1)
    assert torch.equal(stage.tower.quantizer.codebook, book)
    stage.compute(halves[1], 1)
    assert not torch.equal(stage.tower.quantizer.codebook, book)
