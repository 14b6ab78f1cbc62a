"""A batch holds each sample whole and apart from the others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from vilau.configuration import PositionKind
from vilau.data.collate import Batch, collate, collate_padded
from vilau.data.sample import FORMS
from vilau.processing.encode import EncodedSample

PAD = 0
P = 2


def encoded(name: str, length: int, frames: int = 0, form: str = "text_image", value: int = 1) -> EncodedSample:
    """``length`` positions of ids ``100*value + i``; ``frames`` pictures of P visual positions from position 2 on."""
    visual = np.zeros(length, bool)
    visual[2 : 2 + frames * P] = True
    targets = np.ones(length, bool)
    targets[0] = False
    return EncodedSample(
        sample_id=name,
        form=form,
        input_ids=np.where(visual, PAD, 100 * value + np.arange(length)),
        kinds=np.where(visual, int(PositionKind.VISUAL), int(PositionKind.TEXT)).astype(np.int8),
        text_targets=targets & ~visual,
        visual_targets=targets & visual,
        frames=np.full((frames, 4, 4, 3), value, np.uint8) if frames else np.zeros((0, 0, 0, 3), np.uint8),
    )


SAMPLES = [
    encoded("a", 5, frames=1, value=1),
    encoded("b", 9, frames=2, value=2, form="text_video"),
    encoded("c", 4, frames=0, value=3, form="text"),
    encoded("d", 7, frames=1, value=4),
]


def spans(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every sample, from where the positions restart; padding left out."""
    out = []
    for row in range(batch.input_ids.shape[0]):
        starts = [*torch.where(batch.position_ids[row] == 0)[0].tolist(), batch.input_ids.shape[1]]
        for start, stop in itertools.pairwise(starts):
            if batch.kinds[row, start] != PositionKind.PAD:
                out.append((row, start, stop))
    return out


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
def test_every_sample_arrives_whole(layout: Any) -> None:
    """Ids, kinds, targets, positions, forms of each sample are unchanged by packing and padding; frames follow the
    rows."""
    batch = collate(SAMPLES, 16, PAD) if layout == "packed" else collate_padded(SAMPLES, PAD, side=layout)
    assert batch.sample_ids == ("a", "b", "c", "d") and batch.forms == (
        "text_image",
        "text_video",
        "text",
        "text_image",
    )
    seen, frame = [], 0
    for row, start, stop in spans(batch):
        sample = SAMPLES[int(batch.input_ids[row, start]) // 100 - 1]
        seen.append(sample.sample_id)
        assert stop - start == len(sample)
        for name in ("input_ids", "kinds", "text_targets", "visual_targets"):
            assert getattr(batch, name)[row, start:stop].tolist() == getattr(sample, name).tolist()
        assert batch.position_ids[row, start:stop].tolist() == list(range(len(sample)))
        assert set(batch.form_ids[row, start:stop].tolist()) == {FORMS.index(sample.form)}
        count = len(sample.frames)
        assert np.array_equal(batch.frames[frame : frame + count].numpy(), sample.frames.reshape(-1, 4, 4, 3))
        frame += count
    assert sorted(seen) == ["a", "b", "c", "d"] and frame == len(batch.frames)
    padding = batch.kinds == PositionKind.PAD
    assert (batch.input_ids[padding] == PAD).all() and (batch.form_ids[padding] == -1).all()
    assert not batch.text_targets[padding].any() and not batch.visual_targets[padding].any()
    assert int((batch.kinds == PositionKind.VISUAL).sum()) == P * len(batch.frames)


def test_types_and_row_length() -> None:
    """The contract with the model: dtypes, and rows cut to the longest used one, rounded up to 8."""
    batch = collate(SAMPLES, 64, PAD)
    assert batch.input_ids.shape == (1, 32)
    for name in ("input_ids", "kinds", "position_ids", "form_ids"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.text_targets.dtype == batch.visual_targets.dtype == torch.bool and batch.frames.dtype == torch.uint8
    assert collate(SAMPLES, 16, PAD).input_ids.shape == (2, 16)
    assert collate(SAMPLES[2:3], 64, PAD).input_ids.shape == (1, 8)


def test_positions_restart_at_every_border() -> None:
    """Packing isolation rests on this: each sample and the padding begin at 0, and rise by one inside."""
    batch = collate(SAMPLES, 16, PAD)
    step = batch.position_ids[:, 1:] - batch.position_ids[:, :-1]
    border = step != 1
    assert ((batch.position_ids[:, 1:] == 0) == border).all() and (batch.position_ids[:, 0] == 0).all()
    changes = (batch.form_ids[:, 1:] != batch.form_ids[:, :-1]) | (
        (batch.kinds[:, 1:] == 2) != (batch.kinds[:, :-1] == 2)
    )
    assert (border | ~changes).all()


def test_no_target_crosses_a_border() -> None:
    """The first position of a sample would be predicted from its neighbour: it is never a target, and a sample that
    says so stops."""
    batch = collate(SAMPLES, 16, PAD)
    first = batch.position_ids == 0
    assert not (batch.text_targets & first).any() and not (batch.visual_targets & first).any()
    wrong = encoded("w", 4)
    wrong.text_targets[0] = True
    with pytest.raises(AssertionError, match="sample w: its first position"):
        collate([wrong], 16, PAD)


def test_batch_moves_and_text_only_batches_have_no_frames() -> None:
    """``to`` and ``pin`` give an equal batch; without pictures nothing is encoded."""
    batch = collate([SAMPLES[2]], 16, PAD)
    assert batch.frames.shape == (0, 0, 0, 3)
    moved = batch.to("cpu").pin()
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.sample_ids == batch.sample_ids


def test_errors_name_what_is_wrong() -> None:
    """Empty batches, long samples, mixed sizes and unknown sides give a line that can be acted upon."""
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], 16, PAD)
    with pytest.raises(ValueError, match="sample b has 9 positions, more than a row of 8"):
        collate(SAMPLES, 8, PAD)
    with pytest.raises(ValueError, match="side is 'up'"):
        collate_padded(SAMPLES, PAD, side="up")  # type: ignore[arg-type]
    other = EncodedSample(**{**vars(encoded("e", 5, 1)), "frames": np.zeros((1, 8, 8, 3), np.uint8)})
    with pytest.raises(ValueError, match="different sizes"):
        collate([SAMPLES[0], other], 16, PAD)


def test_codes_take_the_place_of_pixels_in_the_order_of_the_rows() -> None:
    """Codes read beforehand arrive as ``codes`` in the rows' order; pixels beside codes in one batch are refused."""
    coded = [
        EncodedSample(**{**vars(sample), "frames": np.zeros((0, 0, 0, 3), np.uint8), "codes": codes})
        for sample, codes in ((SAMPLES[0], np.full((1, P, 3), 1)), (SAMPLES[1], np.full((2, P, 3), 2)))
    ]
    batch = collate([coded[0], SAMPLES[2], coded[1]], 16, PAD)
    order = [1 if length == 5 else 2 for _, start, stop in spans(batch) if (length := stop - start) in (5, 9)]
    expected = [value for number in order for value in [number] * number]
    assert batch.codes.shape == (3, P, 3) and batch.codes[:, 0, 0].tolist() == expected
    assert batch.frames.shape == (0, 0, 0, 3) and collate([SAMPLES[0]], 16, PAD).codes.shape == (0, 0, 0)
    with pytest.raises(ValueError, match="sample a brings codes and sample d pixels"):
        collate([coded[0], SAMPLES[3]], 16, PAD)
    deeper = EncodedSample(**{**vars(coded[1]), "codes": np.zeros((2, P, 4), np.int64)})
    with pytest.raises(ValueError, match="different shapes"):
        collate([coded[0], deeper], 16, PAD)
