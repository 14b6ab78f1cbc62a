"""Stages `pretrain` and `sft`: the language model, the projector and the depth transformer on mixed sequences."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from vilau.configuration import PositionKind
from vilau.data.collate import Batch, collate
from vilau.data.sample import FORMS, Sample
from vilau.modeling.vila_u import VilaULosses, VilaUModel
from vilau.processing.encode import EncodedSample, encode_sample
from vilau.training import parallel
from vilau.training.adapters import Adapters
from vilau.training.attention import refuse_leak, use_attention
from vilau.training.config import LanguageStageConfig
from vilau.training.flops import LanguageFlops
from vilau.training.stage import Stage, StepResult
from vilau.training.vision_tower import freeze, local_numbers, to_pixel_values


class SampleSource(Protocol):
    """Samples reachable by number."""

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, eq=False)
class CountedBatch:
    """A micro-batch with the supervised text positions and codes of its whole step, over all processes."""

    batch: Batch
    text_count: float
    visual_count: float


class LanguageStage(Stage):
    """Train on packed rows of whole samples; the vision tower is frozen and in evaluation mode (section 3.2).

    Args:
        name: `pretrain` or `sft`.
        model: the joined model.
        source: samples of every form of the stage's mixture.
        processor: tokenizer and template, the ones that inference uses; also knows how to save itself.
        seed: of the text dropout, a function of (seed, sample id), and of `visual_share`, one of the step as well.
    """

    config: LanguageStageConfig
    counts_whole_step = True
    _own_attention: str | None = None

    def __init__(
        self, name: str, config: LanguageStageConfig, model: VilaUModel, source: SampleSource, processor: Any, seed: int
    ) -> None:
        self.name, self.config, self.module = name, config, model
        self.model, self.source, self.processor, self.seed = model, source, processor, seed
        model.vision_tower.requires_grad_(False)
        self.adapters = Adapters(model, config.lora) if config.lora is not None else None
        freeze(model, config.freeze)

    def train_mode(self) -> None:
        self.model.train()
        self.model.vision_tower.eval()

    def make_batch(self, step: int, rank: int, world_size: int) -> Batch:
        numbers = local_numbers(step, self.config.batch_size, rank, world_size)
        encoded = [self._thinned(read_encoded(self.source, number, self._encode), step) for number in numbers]
        return collate(encoded, self.config.row_length, int(self.processor.tokenizer.pad_token_id))

    def _encode(self, sample: Sample) -> EncodedSample:
        positions = self.model.config.vision_config.num_positions
        return encode_for_stage(sample, self.config, self.processor, positions, self.seed)

    def _thinned(self, sample: EncodedSample, step: int) -> EncodedSample:
        """Leave the positions in the depth loss that `visual_share` draws."""
        share = self.config.visual_share
        if share == 1:
            return sample
        kept = keeps_positions(self.seed, step, sample.sample_id, len(sample), share)
        return replace(sample, visual_targets=sample.visual_targets & kept)

    def use_attention(self, name: str | None, device: torch.device, bf16: bool) -> None:
        if name is None:
            if self.config.init_language_model is not None:
                refuse_leak(self.model.language_model.config, device, bf16)
            return
        self._own_attention = self.model.language_model.config._attn_implementation
        use_attention(self.model.language_model, name, device, bf16)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The attention that the model came with: those for training can want bfloat16 or compile for every length."""
        model = self.model.language_model
        chosen = model.config._attn_implementation
        if self._own_attention is not None:
            model.set_attn_implementation(self._own_attention)
        try:
            yield
        finally:
            if self._own_attention is not None:
                model.set_attn_implementation(chosen)

    def sharded_blocks(self) -> list[nn.Module]:
        return list(self.model.language_model.base_model.layers)

    def prepare(self, batches: Sequence[Batch]) -> list[CountedBatch]:
        """Count targets over the step, to divide by."""
        depth = self.model.config.vision_config.depth
        text = sum(float(batch.text_targets.sum()) for batch in batches)
        visual = sum(float(batch.visual_targets.sum()) * depth for batch in batches)
        counts = parallel.sum_over_ranks(torch.tensor([text, visual], dtype=torch.float64)).clamp_min(1).tolist()
        return [CountedBatch(batch, *counts) for batch in batches]

    @cached_property
    def _flops(self) -> LanguageFlops:
        return LanguageFlops(self.model)

    def work(self, batch: Batch) -> dict[str, float]:
        """Return tokens without padding, pictures and frames, and operations of a micro-batch."""
        there = batch.form_ids >= 0
        sizes = self.model.config.vision_config
        positions = float((batch.kinds == PositionKind.VISUAL).sum())
        tokens, text = float(there.sum()), float(batch.text_targets.sum())
        codes = float(batch.visual_targets.sum()) * sizes.depth
        pairs = float((batch.position_ids[there] + 1).sum())
        flops = self._flops(tokens, pairs, positions, text, codes, len(batch.frames))
        return {"tokens": tokens, "images": positions / sizes.num_positions, "flops": flops}

    def compute(self, batch: Batch | CountedBatch, step: int) -> StepResult:
        """Return loss and figures of a prepared micro-batch; one that was not prepared is a step of its own."""
        counted = batch if isinstance(batch, CountedBatch) else self.prepare([batch])[0]
        batch = counted.batch.to(self.model.device)
        codes, pixel_values = self._pictures(batch)
        losses = self.model.losses(
            batch.input_ids,
            batch.kinds,
            batch.text_targets,
            batch.visual_targets,
            codes=codes,
            pixel_values=pixel_values,
            position_ids=batch.position_ids,
            fused=self.config.fused_loss,
        )
        loss = self.config.text_weight * losses.text.sum() / counted.text_count
        loss = loss + self.config.visual_weight * losses.visual.sum() / counted.visual_count
        sums: dict[str, Any] = {
            "text": (losses.text.detach().sum(), losses.text.numel()),
            "visual": (losses.visual.detach().sum(), losses.visual.numel()),
            "padding": (1.0 - float((batch.form_ids >= 0).float().mean()), 1),
            "shortened": (float(batch.shortened), len(batch.sample_ids)),
        }
        return StepResult(loss, sums | _by_form(losses, batch))

    def _pictures(self, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return codes, or pixels for a tower without; codes are made in float32 in any precision, as stored ones."""
        if len(batch.codes):
            return batch.codes, None
        if not len(batch.frames):
            return None, None
        pixel_values, tower = to_pixel_values(batch.frames), self.model.vision_tower
        if not tower.quantizer.discrete:
            return None, pixel_values
        with torch.autocast(pixel_values.device.type, enabled=False):
            return tower.encode(pixel_values), None

    def save_result(self, folder: Path) -> None:
        if self.adapters is None:
            self.model.save_pretrained(folder)
        else:
            self.adapters.save(folder / "adapter")
            self.model.save_pretrained(folder, state_dict=self.adapters.merged_state(self.model))
        self.processor.save_pretrained(folder)


def read_encoded(source: SampleSource, number: int, encode: Callable[[Sample], EncodedSample]) -> EncodedSample:
    """Return a sample ready to pack; where the source can, one that cannot be used or never fits gives way."""
    draw = getattr(source, "draw", None)
    return encode(source[number]) if draw is None else draw(number, encode)


def encode_for_stage(
    sample: Sample, config: LanguageStageConfig, processor: Any, positions_per_frame: int, seed: int
) -> EncodedSample:
    """Return a sample as a stage trains on it; ``BadSample`` where it never fits into a row."""
    return encode_sample(
        sample,
        processor.tokenizer,
        processor.template,
        positions_per_frame,
        drop_text=drops_text(seed, sample.id, config.text_dropout),
        supervise=config.supervise,
        max_length=config.row_length,
    )


def drops_text(seed: int, sample_id: str, share: float) -> bool:
    """Return whether a prompt is emptied for guidance: the same answer for a sample on every process and resume."""
    return zlib.crc32(f"{seed}/{sample_id}".encode()) < share * 2**32


def keeps_positions(seed: int, step: int, sample_id: str, length: int, share: float) -> np.ndarray:
    """Return bool ``(length,)``, a share of it true, drawn anew each step: the same on every process and resume."""
    return np.random.default_rng(zlib.crc32(f"{seed}/{step}/{sample_id}".encode())).random(length) < share


def _by_form(losses: VilaULosses, batch: Batch) -> dict[str, tuple[Any, Any]]:
    forms = batch.form_ids.flatten()
    figures: dict[str, tuple[Any, Any]] = {}
    for kind, values, at in (("text", losses.text, losses.text_at), ("visual", losses.visual, losses.visual_at)):
        for number in forms[at].unique().tolist():
            own = values.detach()[forms[at] == number]
            figures[f"{kind}/{FORMS[number]}"] = (own.sum(), own.numel())
    return figures
