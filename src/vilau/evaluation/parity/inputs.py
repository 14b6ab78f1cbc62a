"""Checks of what goes in: token ids, pixels, training samples."""

from __future__ import annotations

import re

import numpy as np
import torch

from vilau.configuration import PositionKind
from vilau.evaluation.parity.chats import PLACEHOLDER, prompt_turns
from vilau.evaluation.parity.compare import Outcome
from vilau.evaluation.parity.subject import Subject, reference_crop, reference_pad
from vilau.processing.encode import EncodedSample, encode_prompt, encode_sample


def prompt_ids(subject: Subject, found: re.Match[str]) -> Outcome:
    """Token ids of a prompt, pictures as -200."""
    case = found["case"]
    if case not in subject.golden.prompts:
        raise ValueError(f"prompts.json has no case {case!r}")
    turns, mode = prompt_turns(subject.golden.prompts[case])
    processor = subject.processor
    encoded = encode_prompt(turns, processor.tokenizer, processor.template, 1, mode)
    return Outcome(torch.from_numpy(_with_placeholders(encoded)), "equal")


def given_pixels(subject: Subject, found: re.Match[str]) -> Outcome:
    """The pictures as they are shown to the model; the reference holds them as input."""
    chosen = subject.pixels[:1] if found["which"] else subject.pixels
    return Outcome(chosen)


def cropped_pixels(subject: Subject, found: re.Match[str]) -> Outcome:
    """Both pictures cropped or padded by the reference, as uint8."""
    rule = reference_crop if found["mode"] == "generation" else reference_pad
    frames = [rule(subject.golden.picture(letter), subject.size) for letter in "ab"]
    note = "top crop of portraits" if found["mode"] == "generation" else "padded, not squashed"
    return Outcome(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), "equal", True, note)


def sample_tokens(subject: Subject, found: re.Match[str]) -> Outcome:
    """Ids or labels of a training sample, one entry per picture or frame."""
    processor, sample = subject.processor, subject.sample(found["case"])
    encoded = encode_sample(sample, processor.tokenizer, processor.template, 1)
    ids = _with_placeholders(encoded)
    if found["what"] == "labels":  # supervised pictures carry their placeholder
        ids = np.where(encoded.text_targets | encoded.visual_targets, ids, -100)
    return Outcome(torch.from_numpy(ids), "equal")


def image_means(subject: Subject, found: re.Match[str]) -> Outcome:
    """Mean pixel value of each frame of a training sample."""
    frames = subject.encoded(found["case"]).frames
    cropped = subject.cropped_by_reference((found["case"],))
    note = "top crop of portraits" if cropped else ""
    return Outcome(subject.pixel_values(list(frames)).mean((1, 2, 3)), "abs", cropped, note)


def _with_placeholders(encoded: EncodedSample) -> np.ndarray:
    return np.where(encoded.kinds == PositionKind.VISUAL, PLACEHOLDER, encoded.input_ids)


CHECKS = (
    (r"a\.ids\.(?P<case>\w+)", prompt_ids),
    (r"b\.pixel_values(?P<which>_a)?", given_pixels),
    (r"b\.(?P<mode>generation|pad)_mode_u8", cropped_pixels),
    (r"h\.sample\.(?P<case>\w+)\.(?P<what>input_ids|labels)", sample_tokens),
    (r"h\.image_means\.(?P<case>\w+)", image_means),
)
