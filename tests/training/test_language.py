"""Stages `pretrain` and `sft`: losses, who learns, text dropout, what they save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vilau.data.collate import collate_padded
from vilau.data.sample import Sample, Turn, image, text, video
from vilau.data.sources.source import BadSample
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.encode import encode_sample
from vilau.processing.processor import build_processor
from vilau.training.config import LanguageStageConfig, LoraConfig, OptimizerConfig
from vilau.training.language import LanguageStage, drops_text, keeps_positions
from vilau.training.optimizers import build_optimizers, lr_share, set_lr
from vilau.training.vision_tower import to_pixel_values

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "gray": (128, 128, 128)}
FORMS = ("text_image", "image_text", "text_video", "text", "interleaved")


class Plain:
    """Samples of five forms in turn over pictures of one colour."""

    def __getitem__(self, index: int) -> Sample:
        name, colour = list(COLOURS.items())[(index // len(FORMS)) % len(COLOURS)]
        form, picture = FORMS[index % len(FORMS)], np.full((16, 16, 3), colour, np.uint8)
        words = text(f"a {name} picture")
        turns = {
            "text_image": (Turn("user", (words,)), Turn("assistant", (image(picture),))),
            "image_text": (Turn("user", (image(picture),)), Turn("assistant", (words,))),
            "text_video": (Turn("user", (words,)), Turn("assistant", (video((picture, picture)),))),
            "text": (Turn("user", (text("hello"),)), Turn("assistant", (words,))),
            "interleaved": (Turn("document", (words, image(picture), words)),),
        }[form]
        return Sample(f"sample-{index}", form, turns)


@pytest.fixture
def make_stage(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., LanguageStage]:
    """A function that returns a stage over `Plain` with the very small model."""

    def build(**settings: Any) -> LanguageStage:
        embedding = {"vocab_size": len(tokenizer), "initializer_range": 0.05, "max_position_embeddings": 128}
        model = make_model(text=embedding | {"tie_word_embeddings": True})
        optimizer = OptimizerConfig(name="muon", lr=5e-3, warmup_steps=3)
        fields = {"steps": 20, "batch_size": 10, "row_length": 64, "text_dropout": 0.0, "optimizer": optimizer}
        config = LanguageStageConfig(**(fields | settings))
        return LanguageStage("pretrain", config, model, Plain(), build_processor(tokenizer, model.config), seed=3)

    return build


def train(stage: LanguageStage, steps: int) -> list[float]:
    """Plain training; returns the losses."""
    optimizers = build_optimizers(stage.module, stage.config.optimizer)
    losses = []
    for step in range(steps):
        stage.train_mode()
        set_lr(optimizers, lr_share(step, steps, stage.config.optimizer))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = stage.compute(stage.make_batch(step, 0, 1), step).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_learns_and_leaves_the_tower_alone(make_stage: Callable[..., LanguageStage]) -> None:
    """Loss falls; language model, projector and depth transformer move; the tower is bit-identical, averages too."""
    stage = make_stage()
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    losses = train(stage, 20)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    moved = {name for name, tensor in stage.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("vision_tower.") for name in moved)
    for part in ("language_model.", "projector.", "depth_transformer.position_embedding", "depth_transformer.head"):
        assert any(name.startswith(part) for name in moved), part
    assert not stage.model.vision_tower.training and stage.model.language_model.training


@torch.no_grad()
def test_packed_loss_is_that_of_samples_alone(make_stage: Callable[..., LanguageStage], tokenizer: Any) -> None:
    """One step's loss: mean over text tokens plus mean over codes of the samples, each in a row of its own."""
    stage = make_stage()
    stage.model.eval()
    result = stage.compute(stage.make_batch(0, 0, 1), 0)
    text_sum, text_count, visual_sum, visual_count = 0.0, 0, 0.0, 0
    for number in range(10):
        sample = encode_sample(stage.source[number], tokenizer, stage.processor.template, 4)
        batch = collate_padded([sample], tokenizer.pad_token_id)
        frames = to_pixel_values(batch.frames) if len(batch.frames) else None
        own = stage.model.losses(
            batch.input_ids, batch.kinds, batch.text_targets, batch.visual_targets, pixel_values=frames
        )
        text_sum, text_count = text_sum + float(own.text.sum()), text_count + own.text.numel()
        visual_sum, visual_count = visual_sum + float(own.visual.sum()), visual_count + own.visual.numel()
    assert float(result.loss) == pytest.approx(text_sum / text_count + visual_sum / visual_count, rel=1e-4)
    sums = {name: (float(a), float(b)) for name, (a, b) in result.sums.items()}
    assert sums["text"] == pytest.approx((text_sum, text_count), rel=1e-4)
    assert sums["visual"] == pytest.approx((visual_sum, visual_count), rel=1e-4)
    for kind in ("text", "visual"):
        parts = [value for name, value in sums.items() if name.startswith(f"{kind}/")]
        assert sum(a for a, _ in parts) == pytest.approx(sums[kind][0], rel=1e-4)
        assert sum(b for _, b in parts) == sums[kind][1]
    assert visual_count == 2 * (4 + 8) * 3 and "visual/image_text" not in sums and "visual/interleaved" not in sums


@torch.no_grad()
def test_weights_scale_the_two_losses(make_stage: Callable[..., LanguageStage]) -> None:
    """`text_weight` and `visual_weight` weigh the two means."""
    plain, stage = make_stage(), make_stage(text_weight=0.5, visual_weight=2.0)
    plain.model.eval(), stage.model.eval()
    one, two = plain.compute(plain.make_batch(0, 0, 1), 0), stage.compute(stage.make_batch(0, 0, 1), 0)
    sums = {name: float(a) / float(b) for name, (a, b) in one.sums.items() if name in ("text", "visual")}
    assert float(one.loss) == pytest.approx(sums["text"] + sums["visual"], rel=1e-5)
    assert float(two.loss) == pytest.approx(0.5 * sums["text"] + 2 * sums["visual"], rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_text_dropout_share(share: float) -> None:
    """The set share of prompts is emptied, exactly none and all at the ends, the same ones every time."""
    ids = [f"train/text_image/{number}" for number in range(20_000)]
    dropped = [drops_text(5, sample, share) for sample in ids]
    assert dropped == [drops_text(5, sample, share) for sample in ids]
    assert abs(sum(dropped) / len(ids) - share) < (0.01 if 0 < share < 1 else 1e-9)


def test_text_dropout_is_drawn_per_seed() -> None:
    """Another seed drops other prompts, and within a seed neighbouring samples are dropped independently."""
    one, two = ([drops_text(seed, f"sample-{n}", 0.5) for n in range(4000)] for seed in (1, 2))
    assert one != two
    repeats = sum(a == b for a, b in zip(one[:-1], one[1:], strict=True)) / 3999
    assert 0.4 < repeats < 0.6


def test_dropped_text_is_the_unconditional_prompt(make_stage: Callable[..., LanguageStage], tokenizer: Any) -> None:
    """With dropout 1 the trained prompt of a picture is exactly the one that guidance uses; other forms keep theirs."""
    stage = make_stage(text_dropout=1.0)
    picture, caption = stage._encode(stage.source[0]), stage._encode(stage.source[1])
    empty = stage.processor.unconditional("image")["input_ids"][0].tolist()
    assert picture.input_ids[: len(empty)].tolist() == empty
    assert picture.visual_targets[len(empty) : len(empty) + 4].all()
    kept = make_stage(text_dropout=0.0)
    assert caption.input_ids.tolist() == kept._encode(kept.source[1]).input_ids.tolist()
    assert len(kept._encode(kept.source[0])) > len(picture)


def test_batches_are_a_function_of_the_step(make_stage: Callable[..., LanguageStage]) -> None:
    """Same step, same batch; two processes together hold the samples of one."""
    stage = make_stage(text_dropout=0.5)
    one, two = stage.make_batch(2, 0, 1), stage.make_batch(2, 0, 1)
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.frames, two.frames)
    parts = [stage.make_batch(2, rank, 2).sample_ids for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(one.sample_ids)


def test_a_sample_longer_than_a_row_is_named(make_stage: Callable[..., LanguageStage]) -> None:
    """Nothing is cut silently: the error names the sample and the remedy."""
    with pytest.raises(ValueError, match="sample-2 has .* raise row_length"):
        make_stage(row_length=16, batch_size=3).make_batch(0, 0, 1)


def test_long_samples_are_shortened_and_counted(make_stage: Callable[..., LanguageStage]) -> None:
    """A document that does not fit loses its last parts, which the log shows as a share of all samples."""
    parts = Plain()[4].turns[0].parts
    story = Sample("story", "interleaved", (Turn("document", parts + parts[1:]),))
    whole = make_stage(batch_size=5)._encode(story)
    stage = make_stage(row_length=len(whole) - 1, batch_size=5)
    short = stage._encode(story)
    assert short.left_out == 1 and len(short) < len(whole)
    batch = collate_padded([short, short, stage._encode(Plain()[3])], 0)
    assert batch.shortened == 2
    assert stage.compute(batch, 0).sums["shortened"] == (2.0, 3)


def test_a_source_may_replace_what_never_fits(make_stage: Callable[..., LanguageStage]) -> None:
    """Encoding happens where a mixture can count a sample as bad and take another one instead."""
    stage = make_stage(row_length=16, batch_size=5)

    class Replacing(Plain):
        def draw(self, number: int, use: Callable[[Sample], Any]) -> Any:
            try:
                return use(self[number])
            except BadSample as bad:
                assert bad.kind == "too_long"
                return use(self[3])

    stage.source = Replacing()
    ids = stage.make_batch(0, 0, 1).sample_ids
    assert ids.count("sample-3") > 1 and len(ids) == 5


def test_loss_on_both_sides_is_a_switch(make_stage: Callable[..., LanguageStage]) -> None:
    """`supervise: both` adds the pictures of captions and the words of prompts to the targets."""
    latter, both = (make_stage(supervise=side, batch_size=5).make_batch(0, 0, 1) for side in ("latter", "both"))
    assert both.input_ids.tolist() == latter.input_ids.tolist()
    assert int(both.visual_targets.sum()) > int(latter.visual_targets.sum())
    assert bool((both.text_targets >= latter.text_targets).all())


def test_result_is_a_model_that_generates(make_stage: Callable[..., LanguageStage], tmp_path: Path) -> None:
    """The finished stage loads as the public class with its processor and draws."""
    stage = make_stage()
    stage.save_result(tmp_path)
    model = VilaUForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = type(stage.processor).from_pretrained(tmp_path)
    inputs = processor.apply_chat_template([{"role": "user", "content": "a red picture"}], generation_mode="image")
    out = model.generate(**inputs, generation_mode="image", guidance_scale=1.0)
    assert out.pixel_values.shape == (1, 3, 16, 16)


@torch.no_grad()
def test_codes_read_beforehand_give_the_same_losses(make_stage: Callable[..., LanguageStage]) -> None:
    """A batch of codes in place of pixels has the same losses, bit for bit, and the tower is not asked."""
    stage = make_stage()
    stage.train_mode()
    batch = stage.make_batch(0, 0, 1)
    codes = stage.model.vision_tower.encode(to_pixel_values(batch.frames))
    coded = replace(batch, frames=batch.frames[:0], codes=codes)
    expected = stage.compute(batch, 0).loss
    stage.model.vision_tower.encode = None  # type: ignore[assignment, method-assign]
    assert torch.equal(stage.compute(coded, 0).loss, expected)


def test_a_stage_with_adapters_trains_them_alone_and_saves_both_forms(
    make_stage: Callable[..., LanguageStage], tmp_path: Path
) -> None:
    """`lora` in the configuration: the loss falls, base weights stay, the result is a whole model and an adapter."""
    adam = OptimizerConfig(lr=2e-2, warmup_steps=3)
    stage = make_stage(lora=LoraConfig(rank=4, also=["projector"]), optimizer=adam)
    base = {n: p.clone() for n, p in stage.model.named_parameters() if not p.requires_grad}
    losses = train(stage, 12)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(torch.equal(p, base[n]) for n, p in stage.model.named_parameters() if n in base)
    stage.save_result(tmp_path)
    stage.model.eval()
    whole = VilaUForConditionalGeneration.from_pretrained(tmp_path)
    batch = stage.make_batch(0, 0, 1)
    expected = stage.compute(batch, 0).loss
    stage.model = whole.eval()
    assert torch.allclose(stage.compute(batch, 0).loss, expected, rtol=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_share_of_the_positions_estimates_the_loss_of_all(make_stage: Callable[..., LanguageStage]) -> None:
    """`visual_share` leaves codes out of the loss, not out of the context: text is as before, the mean nearly so."""
    stage, half = make_stage(batch_size=40), make_stage(batch_size=40, visual_share=0.5)
    torch.manual_seed(1)
    every, some = (one.compute(one.make_batch(0, 0, 1), 0).sums for one in (stage, half))
    assert torch.equal(every["text"][0], some["text"][0])
    assert 0.35 < some["visual"][1] / every["visual"][1] < 0.65
    assert some["visual"][0] / some["visual"][1] == pytest.approx(
        float(every["visual"][0] / every["visual"][1]), rel=0.05
    )


def test_positions_in_the_loss_are_drawn_per_seed_step_and_sample() -> None:
    """The set share of positions, the same ones when asked again; another seed, step or sample draws others."""
    kept = keeps_positions(3, 7, "sample", 20_000, 0.25)
    assert np.array_equal(kept, keeps_positions(3, 7, "sample", 20_000, 0.25))
    assert abs(kept.mean() - 0.25) < 0.02
    for other in ((4, 7, "sample"), (3, 8, "sample"), (3, 7, "other")):
        again = keeps_positions(*other, 20_000, 0.25)
        assert abs((kept & again).mean() - 0.25**2) < 0.02, other


def test_processes_leave_the_same_positions_out_of_the_loss(make_stage: Callable[..., LanguageStage]) -> None:
    """What two processes pack into other rows than one does has the same positions in the depth loss."""
    stage = make_stage(visual_share=0.5)
    for step in range(2):
        one, *two = (stage.make_batch(step, rank, size) for rank, size in ((0, 1), (0, 2), (1, 2)))
        counts = [[float(r.sums["visual"][i]) for r in (stage.compute(b, step) for b in two)] for i in (0, 1)]
        whole = stage.compute(one, step).sums["visual"]
        assert sum(counts[1]) == whole[1] and sum(counts[0]) == pytest.approx(float(whole[0]), rel=1e-5)
