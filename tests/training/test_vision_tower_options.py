"""Stage `vision_tower` with everything on: resume, export, part of the batch, missing captions, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TowerStageConfig
from vilau.training.losses import NO_CAPTION, contrastive_loss
from vilau.training.vision_tower import TowerBatch, TowerStage, is_reconstructed

LENGTH = 6
EVERYTHING: dict[str, Any] = {
    "contrastive": "softmax",
    "perceptual": "siglip",
    "perceptual_weight": 0.2,
    "adversarial_weight": 0.75,
    "adversarial_start": 2,
    "discriminator": {"channels": 8, "layers": 1},
    "discriminator_optimizer": {"lr": 1e-3, "warmup_steps": 50},
    "weight_ema": 0.5,
    "reconstruction_share": 0.6,
}


class Noise:
    """Pictures of noise with captions of two words, some of them missing where `silent` says so."""

    def __init__(self, silent: frozenset[int] = frozenset()) -> None:
        self.silent = silent

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return pixels, " " if index in self.silent else f"red {index}"


@pytest.fixture
def make_stage(
    make_config: Callable[..., Any], tokenizer: Any, caption_encoder: dict[str, Any]
) -> Callable[..., TowerStage]:
    """A function that returns a stage over `Noise` with a small tower."""
    text = caption_encoder | {"max_position_embeddings": LENGTH}

    def build(source: Noise | None = None, fields: dict[str, Any] | None = None, **settings: Any) -> TowerStage:
        torch.manual_seed(0)
        tower = VisionTower(make_config(**{"text_encoder_config": text} | (fields or {})).vision_config)
        config = TowerStageConfig(**({"steps": 6, "batch_size": 8} | settings))
        return TowerStage("vision_tower", config, tower, source or Noise(), tokenizer, LENGTH, seed=5)

    return build


def digest(folder: Path) -> str:
    """The digest of a finished stage."""
    return json.loads((folder / "training.json").read_text())["digest"]


def test_resume_is_exact_with_everything_on(
    make_stage: Callable[..., TowerStage], engine: Callable[..., Any], tmp_path: Path
) -> None:
    """R1 with discriminator and averaged weights: a run stopped after 3 of 6 steps ends in the digest of one piece."""

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 3:
            raise Stop

    whole = digest(engine(make_stage(**EVERYTHING), folder=tmp_path / "whole", save_every=2).run())
    with pytest.raises(Stop):
        engine(make_stage(**EVERYTHING), folder=tmp_path / "parts", save_every=2, on_step=stop).run()
    resumed = engine(make_stage(**EVERYTHING), folder=tmp_path / "parts", save_every=2)
    assert digest(resumed.run()) == whole
    state = load_file(tmp_path / "parts" / "checkpoints" / "step-0000006" / "module.safetensors")
    kinds = {name.split(".")[0] for name in state}
    assert kinds == {"tower", "discriminator", "weight_average"}
    plain = digest(engine(make_stage(), folder=tmp_path / "plain").run())
    assert plain != whole


def test_the_averaged_weights_are_exported(
    make_stage: Callable[..., TowerStage], engine: Callable[..., Any], tmp_path: Path
) -> None:
    """What is written is the average, under the tower's own names; the codebook is the trained one."""
    stage = make_stage(**EVERYTHING)
    folder = engine(stage, folder=tmp_path / "run").run()
    written = VisionTower.from_pretrained(folder).state_dict()
    averages = stage.weight_average
    assert averages is not None
    moved = 0
    for name, tensor in stage.tower.state_dict().items():
        average = averages.state_dict().get(name.replace(".", "/"))
        assert torch.equal(written[name], tensor if average is None else average), name
        moved += average is not None and not torch.equal(average, tensor)
    assert moved > 10
    assert not any(name.startswith("text_encoder") for name in averages.sources)


def test_tower_and_discriminator_are_apart(make_stage: Callable[..., TowerStage]) -> None:
    """Two optimizers with their own schedules, clipped apart; each loss reaches its own network only."""
    stage = make_stage(**EVERYTHING)
    optimizers = stage.build_optimizers()
    assert len(optimizers) == 2 and stage.discriminator is not None
    assert optimizers[1].param_groups[0]["betas"] == (0.5, 0.9), "what the file leaves out is RQ-VAE's"
    groups = stage.clip_groups(optimizers)
    assert [group.name for group in groups] == ["", "discriminator"]
    own = {id(p) for p in stage.discriminator.parameters()}
    assert {id(p) for p in groups[1].parameters} == own and own.isdisjoint(id(p) for p in groups[0].parameters)
    stage.set_learning_rates(optimizers, 0)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(1e-3 / 50)  # the first of 50 steps of warm-up
    stage.set_learning_rates(optimizers, 5)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(4e-3 / 50), "counted from the adversarial start"
    stage.train_mode()
    stage.compute(stage.make_batch(0, 0, 1), 0).loss.backward()
    assert all(p.grad is None for p in stage.discriminator.parameters()), "not asked before its step"
    stage.compute(stage.make_batch(2, 0, 1), 2).loss.backward()
    assert all(p.grad is not None for p in stage.discriminator.parameters())


def test_a_share_is_reconstructed(make_stage: Callable[..., TowerStage]) -> None:
    """Which samples are drawn depends on seed and number alone, about the share asked for; the loss is their mean."""
    chosen = [is_reconstructed(1, n, 0.3) for n in range(4000)]
    assert sum(chosen) == pytest.approx(1200, abs=100)
    assert chosen != [is_reconstructed(2, n, 0.3) for n in range(4000)]
    settings: dict[str, Any] = {"contrastive_weight": 0, "pixel_weight": 1.0}
    stage = make_stage(reconstruction_share=0.5, **settings)
    batch = stage.make_batch(0, 0, 1)
    stage.tower.eval()
    drawn = torch.tensor([is_reconstructed(5, n, 0.5) for n in batch.numbers.tolist()])
    assert 0 < int(drawn.sum()) < 8
    sums = stage.compute(batch, 0).sums
    part = TowerBatch(batch.pixels[drawn], batch.text_ids[drawn], batch.captions[drawn], batch.numbers[drawn])
    alone = make_stage(**settings)
    alone.tower.eval()
    expected = alone.compute(part, 0).sums
    assert float(sums["pixel"][0]) == pytest.approx(float(expected["pixel"][0]), rel=1e-5)
    assert float(sums["psnr"][0]) == pytest.approx(float(expected["psnr"][0]), rel=1e-5)
    nothing = stage.compute(TowerBatch(*(t[~drawn] for t in vars(batch).values())), 0)
    assert float(nothing.sums["pixel"][1]) == 0 and torch.isfinite(nothing.loss)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_pictures_without_captions_take_no_part(kind: str) -> None:
    """The contrastive loss of a batch with empty captions is that of the batch without those pictures."""
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 4), dim=-1) for _ in range(2))
    scale, bias = torch.tensor([1.0]), torch.tensor([-1.0])
    labels = torch.tensor([7, NO_CAPTION, 8, NO_CAPTION, 7])
    kept = labels != NO_CAPTION
    leaf = images.clone().requires_grad_()
    loss = contrastive_loss(leaf, texts, scale, bias, kind, labels)
    expected = contrastive_loss(images[kept], texts[kept], scale, bias, kind, labels[kept])
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert leaf.grad is not None and float(leaf.grad[~kept].abs().max()) == 0 and torch.isfinite(leaf.grad).all()
    silent = contrastive_loss(leaf, texts, scale, bias, kind, torch.full((5,), NO_CAPTION))
    silent.backward()
    assert float(silent.detach()) == 0 and torch.isfinite(leaf.grad).all()


def test_empty_captions_are_counted(make_stage: Callable[..., TowerStage]) -> None:
    """They are in the figures; their pictures are reconstructed all the same."""
    stage = make_stage(Noise(frozenset({1, 6})))
    result = stage.compute(stage.make_batch(0, 0, 1), 0)
    assert int(result.sums["captions_empty"][0]) == 2 and int(result.sums["retrieval"][1]) == 6
    assert float(result.sums["pixel"][1]) == 1 and torch.isfinite(result.loss)
    assert "captions_empty" not in make_stage().compute(stage.make_batch(1, 0, 1), 1).sums


def test_reconstruction_needs_no_text(make_stage: Callable[..., TowerStage]) -> None:
    """Section 5.1's ablation and the RQ-VAE tower: no text encoder, no contrast, and it trains."""
    for encoder in ({}, {"encoder_type": "conv"}):
        stage = make_stage(fields={"text_encoder_config": None} | encoder, contrastive_weight=0)
        stage.train_mode()
        result = stage.compute(stage.make_batch(0, 0, 1), 0)
        result.loss.backward()
        assert {"contrast", "retrieval"}.isdisjoint(result.sums) and float(result.loss) > 0
        assert stage.tower.pixel_decoder.last_layer.grad is not None


def test_contrast_alone_on_continuous_tokens(make_stage: Callable[..., TowerStage]) -> None:
    """The paper's point of comparison: quantizer `none`, nothing drawn; the decoder is left alone."""
    stage = make_stage(fields={"quantizer": "none"}, reconstruction_weight=0)
    stage.train_mode()
    result = stage.compute(stage.make_batch(0, 0, 1), 0)
    result.loss.backward()
    assert set(result.sums) == {"contrast", "retrieval"}
    assert not any(p.requires_grad for p in stage.tower.pixel_decoder.parameters())


@pytest.mark.parametrize(
    ("settings", "fields", "words"),
    [
        ({"contrastive_weight": 0, "reconstruction_weight": 0}, {}, "no loss: set contrastive_weight or recon"),
        ({}, {"text_encoder_config": None}, "configure text_encoder, .* or set contrastive_weight to 0"),
        ({"batch_size": 2}, {"codebook_size": 64}, "batch_size 2 gives 24 vectors .* restart 64 codes; .* at least 6"),
        ({"adversarial_weight": 1, "discriminator": {"layers": 4}}, {}, "leaves nothing of a picture of 16 px"),
        ({"perceptual": "lpips", "lpips_weights": ["/no/file.pth"]}, {}, "cannot read /no/file.pth"),
    ],
)
def test_what_cannot_train_is_refused(
    make_stage: Callable[..., TowerStage], settings: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    """Said before the first batch, with numbers and remedy."""
    with pytest.raises(ValueError, match=words):
        make_stage(fields=fields, **settings)


def test_nan_stops_before_the_update(make_stage: Callable[..., TowerStage], engine: Callable[..., Any]) -> None:
    """R6 for this stage: weights that became NaN give a named error at the next step, no update."""
    from vilau.training.engine import TrainingError

    stage = make_stage(**EVERYTHING)
    running = engine(stage, on_step=lambda step: step == 2 and stage.tower.logit_scale.data.fill_(float("nan")))
    with pytest.raises(TrainingError, match="vision_tower: the loss of step 3 is not finite"):
        running.run()
    assert stage.tower.pixel_decoder.last_layer.isfinite().all()
