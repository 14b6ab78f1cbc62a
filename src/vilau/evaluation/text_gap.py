"""What the right prompt is worth: visual cross-entropy under the true and under shuffled prompts, in nats per code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vilau.data.collate import collate
from vilau.data.sample import Sample
from vilau.evaluation.subject import Subject
from vilau.processing.images import normalise

_ROW, _CHUNK = 128, 64


def visual_cross_entropy(subject: Subject, samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """Return the mean cross-entropy of the visual codes under the true and under shuffled prompts.

    Args:
        samples: of the form ``text_image``. With fewer than two different prompts there is nothing to shuffle (None).
    """
    true = _mean_loss(subject, samples)
    mixed = shuffle_prompts(samples)
    return true, _mean_loss(subject, mixed) if mixed else None


def shuffle_prompts(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples, each with the prompt of the next one that shows something else; empty if there is none."""
    out = []
    for number, sample in enumerate(samples):
        others = [samples[(number + step) % len(samples)] for step in range(1, len(samples))]
        other = next((o for o in others if _shows(o) != _shows(sample)), None)
        if other is None:
            return []
        out.append(replace(sample, turns=(other.turns[0], *sample.turns[1:])))
    return out


def _shows(sample: Sample) -> Any:
    return sample.meta.get("caption", sample.turns[0].parts)


@torch.no_grad()
def _mean_loss(subject: Subject, samples: Sequence[Sample]) -> float | None:
    model, processor = subject.model, subject.pipeline.processor
    total, codes = 0.0, 0
    for start in range(0, len(samples), _CHUNK):
        encoded = [processor.encode_sample(sample) for sample in samples[start : start + _CHUNK]]
        longest = max(len(one) for one in encoded)
        batch = collate(encoded, max(_ROW, longest), processor.tokenizer.pad_token_id).to(model.device)
        pixels = torch.from_numpy(normalise(batch.frames.cpu().numpy())).to(model.device, model.dtype)
        losses = model.losses(
            batch.input_ids,
            batch.kinds,
            batch.text_targets,
            batch.visual_targets,
            pixel_values=pixels,
            position_ids=batch.position_ids,
        )
        total += float(losses.visual.double().sum())
        codes += losses.visual.numel()
    return total / codes if codes else None
