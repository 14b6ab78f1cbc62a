"""Every tensor of the golden folders, recomputed: this implementation is the function of the released checkpoints."""

from __future__ import annotations

import pytest

from parity.golden_data import FOLDERS, GOLDEN, load
from vilau.evaluation.parity.compare import NEAR_TIE, TOLERANCES
from vilau.evaluation.parity.golden import GoldenFolder
from vilau.evaluation.parity.report import names, row_of


@pytest.mark.parametrize(
    ("folder", "name"),
    [(folder, name) for folder in FOLDERS for name in names(GoldenFolder(GOLDEN / folder))],
    ids=lambda value: value,
)
def test_tensor(folder: str, name: str) -> None:
    """A tensor of the reference comes out within the tolerance of its kind (each justified in `compare.py`)."""
    row = row_of(load(folder), name)
    assert row is not None, f"no check knows {name}"
    assert row.holds, f"{row.deviation} beyond {row.tolerance} ({row.kind}): {row.note}"


def test_tolerances_are_those_of_the_golden_data() -> None:
    """A tolerance widened to make something pass would be seen here: these are what the data's maker states."""
    assert TOLERANCES == {
        "equal": 0,  # ids, codes, argmax choices, uint8 inputs
        "abs": 1e-4,  # pixels on -1 to 1, hidden states, logits: another order of float32 sums moves them by 1e-5
        "pixel255": 1e-4 * 127.5,  # the same pixels on 0 to 255
        "levels": 1,  # truncation turns a deviation of 1e-5 into one level
        "bf16": 0.05,  # the reference's own bfloat16 decode is 0.036 away from its float32 decode
        "relative": 1e-5,  # losses: rounding cancels in the mean
        "norm": 1e-3,  # gradient norms: errors of two passes add up
        "of_largest": 1e-3,  # gradient entries, which cancel: against the largest
    }
    assert NEAR_TIE == 1e-4  # below this margin rounding decides an argmax


@pytest.mark.parametrize("folder", FOLDERS)
def test_few_tensors_need_a_reference_rule(folder: str) -> None:
    """Only what we do not ship on purpose is recomputed by a rule of the reference; ids, codes and logits never are."""
    golden = GoldenFolder(GOLDEN / folder)
    cheap = [name for name in names(golden) if name[:2] in ("a.", "b.", "c.", "f.")]
    ruled = {name for name in cheap if (row := row_of(load(folder), name)) is not None and row.reference_rule}
    assert ruled <= {"b.generation_mode_u8", "b.pad_mode_u8", "c.tokens_plus_vocab"}
