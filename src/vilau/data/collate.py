"""Encoded samples -> one batch of tensors: packed rows for training, padded rows for comparison and tests.

Packed samples are kept apart by the model: it is called with these restarting ``position_ids`` and
``attention_mask=None``. What this file guarantees is that no target crosses a border: the first position of a sample is
never a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

from ..configuration import PositionKind
from ..processing.encode import EncodedSample
from .packing import pack
from .sample import FORMS

ROW_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """``R`` rows of ``L`` positions; every row holds whole samples, then padding.

    input_ids: ``(R, L)`` int64; pad id at visual and padding positions
    kinds: ``(R, L)`` int64 of ``PositionKind``; PAD at padding
    position_ids: ``(R, L)`` int64, restarting at 0 with every sample and with the padding
    text_targets, visual_targets: ``(R, L)`` bool; this position is predicted from the position before it
    frames: ``(F, S, S, 3)`` uint8 in row-major order of the visual positions, P positions each; ``(0, 0, 0, 3)``
    without frames of pixels
    codes: ``(F, P, D)`` int64 in the same order, in place of ``frames`` where a vision tower has read them already;
    ``(0, 0, 0)`` otherwise
    form_ids: ``(R, L)`` int64, index into ``data.sample.FORMS`` of the sample at each position; -1 at padding
    sample_ids, forms: of the samples, in the order in which they were given (not the order of the rows)
    shortened: how many samples lost turns or parts to fit into a row
    """

    input_ids: torch.Tensor
    kinds: torch.Tensor
    position_ids: torch.Tensor
    text_targets: torch.Tensor
    visual_targets: torch.Tensor
    frames: torch.Tensor
    codes: torch.Tensor
    form_ids: torch.Tensor
    sample_ids: tuple[str, ...]
    forms: tuple[str, ...]
    shortened: int = 0

    def _map(self, function: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in page-locked memory, where there is an accelerator to copy to; otherwise unchanged."""
        return self._map(torch.Tensor.pin_memory) if torch.cuda.is_available() else self

    def pin_memory(self) -> Batch:
        """``pin`` under the name that ``DataLoader(pin_memory=True)`` calls."""
        return self.pin()


def collate(samples: Sequence[EncodedSample], row_length: int, pad_id: int) -> Batch:
    """Pack samples into rows of at most ``row_length`` positions (``pack``) and build a ``Batch``.

    ``L`` is the length of the longest row that came about, rounded up to a multiple of 8. ``ValueError``: no samples,
    or a sample longer than ``row_length`` (named by its id).
    """
    _check(samples)
    for sample in samples:
        if len(sample) > row_length:
            raise ValueError(
                f"sample {sample.sample_id} has {len(sample)} positions, more than a row of {row_length}: "
                "raise row_length, shorten the sample or skip it"
            )
    rows = pack([len(sample) for sample in samples], row_length)
    longest = max(sum(len(samples[index]) for index in row) for row in rows)
    length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    return _build(samples, rows, length, [0] * len(rows), pad_id)


def collate_padded(samples: Sequence[EncodedSample], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """One sample per row, padded on one side to the longest: for comparison with packed rows and for tests."""
    _check(samples)
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}: choose 'right' or 'left'")
    length = max(len(sample) for sample in samples)
    starts = [length - len(sample) if side == "left" else 0 for sample in samples]
    return _build(samples, [[index] for index in range(len(samples))], length, starts, pad_id)


def _check(samples: Sequence[EncodedSample]) -> None:
    if not samples:
        raise ValueError("a batch needs at least one sample: none given")
    for sample in samples:
        assert not (sample.text_targets[0] or sample.visual_targets[0]), (
            f"sample {sample.sample_id}: its first position is a target, which only another sample could predict"
        )
    coded = [sample for sample in samples if len(sample.codes)]
    if coded and len(coded) < sum(len(sample.frames) + len(sample.codes) > 0 for sample in samples):
        pixels = next(sample for sample in samples if len(sample.frames))
        raise ValueError(
            f"sample {coded[0].sample_id} brings codes and sample {pixels.sample_id} pixels: one batch holds one of "
            "the two; encode all sources with `vilau data codes` or none"
        )
    if len({sample.codes.shape[1:] for sample in coded}) > 1:
        raise ValueError("codes of different shapes in one batch: encode all sources with one vision tower")
    sizes = {sample.frames.shape[1:] for sample in samples if len(sample.frames)}
    if len(sizes) > 1:
        raise ValueError(f"frames of different sizes {sorted(sizes)} in one batch: resize them to one image_size first")


def _build(
    samples: Sequence[EncodedSample], rows: Sequence[Sequence[int]], length: int, starts: Sequence[int], pad_id: int
) -> Batch:
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    kinds = np.full(shape, int(PositionKind.PAD), dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    text_targets = np.zeros(shape, dtype=bool)
    visual_targets = np.zeros(shape, dtype=bool)
    form_ids = np.full(shape, -1, dtype=np.int64)
    frames: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for row, members in enumerate(rows):
        at = starts[row]
        position_ids[row, :at] = np.arange(at)
        for index in members:
            sample = samples[index]
            span = slice(at, at + len(sample))
            input_ids[row, span] = sample.input_ids
            kinds[row, span] = sample.kinds
            position_ids[row, span] = np.arange(len(sample))
            text_targets[row, span] = sample.text_targets
            visual_targets[row, span] = sample.visual_targets
            form_ids[row, span] = FORMS.index(sample.form)
            if len(sample.frames):
                frames.append(sample.frames)
            if len(sample.codes):
                codes.append(sample.codes)
            at += len(sample)
        position_ids[row, at:] = np.arange(length - at)
    pixels = np.concatenate(frames) if frames else np.zeros((0, 0, 0, 3), dtype=np.uint8)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        kinds=torch.from_numpy(kinds),
        position_ids=torch.from_numpy(position_ids),
        text_targets=torch.from_numpy(text_targets),
        visual_targets=torch.from_numpy(visual_targets),
        frames=torch.from_numpy(pixels),
        codes=torch.from_numpy(np.concatenate(codes) if codes else np.zeros((0, 0, 0), dtype=np.int64)),
        form_ids=torch.from_numpy(form_ids),
        sample_ids=tuple(sample.sample_id for sample in samples),
        forms=tuple(sample.form for sample in samples),
        shortened=sum(sample.left_out > 0 for sample in samples),
    )
