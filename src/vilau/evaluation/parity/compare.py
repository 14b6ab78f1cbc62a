"""Kinds of agreement, their tolerances, and why these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["equal", "abs", "pixel255", "levels", "bf16", "relative", "norm", "of_largest"]

TOLERANCES: dict[str, float] = {
    # integers: ids, codes, labels, uint8 inputs. There is nothing to round, so nothing may differ.
    "equal": 0,
    # float32 results of a few dozen layers with values of about 1 to 30: another order of summation moves them by
    # about 1e-5; 1e-4 leaves room for another BLAS and is still far below any change of formula.
    "abs": 1e-4,
    # the same, of pixels on the scale 0 to 255
    "pixel255": 1e-4 * 127.5,
    # truncated to uint8: a value that is 1e-5 below a whole number falls to the level below.
    "levels": 1,
    # bfloat16 has 8 bits: the reference's own bfloat16 decode differs from its float32 decode by up to 0.036.
    "bf16": 0.05,
    # losses are means over many positions, in which rounding errors cancel
    "relative": 1e-5,
    # gradients pass every layer twice and are sums over positions; errors accumulate. The bias of attention keys has no
    # gradient at all (it shifts every score of a query alike), only rounding of 1e-9: a norm below 1e-5 of the largest
    # one is measured against that (the smallest true ones are 5e-4 of it).
    "norm": 1e-3,
    # the same for single entries, which may cancel to near zero: measured against the largest entry
    "of_largest": 1e-3,
}
NEAR_TIE = 1e-4  # argmax margins below it are decided by rounding: golden README


@dataclass(frozen=True)
class Outcome:
    """A recomputed tensor: how it is compared, whether by a reference rule, and a remark."""

    tensor: torch.Tensor
    kind: Kind = "abs"
    reference_rule: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table: largest deviation and tolerance of a tensor, in units of its kind."""

    name: str
    deviation: float
    tolerance: float
    kind: str
    reference_rule: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the deviation lies within the tolerance; NaN never does."""
        return self.deviation <= self.tolerance


def compare(name: str, expected: torch.Tensor, outcome: Outcome) -> Row:
    """Largest deviation of a recomputed tensor from the reference's; infinite for another shape."""
    got, tolerance = outcome.tensor.detach().cpu(), TOLERANCES[outcome.kind]
    if got.shape != expected.shape:
        note = f"shape {list(got.shape)}, the reference has {list(expected.shape)}"
        return Row(name, math.inf, tolerance, outcome.kind, outcome.reference_rule, note)
    deviation = _deviation(expected, got, outcome.kind)
    return Row(name, deviation, tolerance, outcome.kind, outcome.reference_rule, outcome.note)


def _deviation(expected: torch.Tensor, got: torch.Tensor, kind: Kind) -> float:
    if kind == "equal":
        return float((got != expected).sum())
    expected, got = expected.double(), got.double()
    both_nan = expected.isnan() & got.isnan()  # the reference gives NaN for a loss that covers nothing
    difference = (got - expected).abs().masked_fill(both_nan, 0.0)
    if not difference.numel():
        return 0.0
    if kind == "relative":
        difference = difference / expected.nan_to_num(1.0).abs().clamp_min(1e-12)
    if kind == "norm":
        difference = difference / expected.abs().clamp_min(max(1e-5 * float(expected.abs().max()), 1e-12))
    if kind == "of_largest":
        difference = difference / expected.abs().max().clamp_min(1e-12)
    return math.nan if bool(difference.isnan().any()) else float(difference.max())
