"""Running all checks of a golden folder, and the table of what came out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vilau.evaluation.parity import drawing, inputs, language, losses, tower
from vilau.evaluation.parity.compare import Outcome, Row, compare
from vilau.evaluation.parity.golden import GoldenFolder
from vilau.evaluation.parity.subject import Subject

Check = Callable[[Subject, re.Match[str]], Outcome]
CHECKS: tuple[tuple[str, Check], ...] = (
    *inputs.CHECKS,
    *tower.CHECKS,
    *language.CHECKS,
    *losses.CHECKS,
    *drawing.CHECKS,
)
GRADIENT_NORMS = re.compile(r"grad_norms_(\w+)\.json")


@dataclass(frozen=True)
class ParityReport:
    """`rows`: every recomputed tensor; `unchecked`: tensors that no check knows."""

    folder: str
    rows: tuple[Row, ...]
    unchecked: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every recomputed tensor lies within its tolerance."""
        return all(row.holds for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a deviation that is no number (another shape, a failed check) is null."""
        rows = [asdict(row) | {"holds": row.holds} for row in self.rows]
        for row in rows:
            row["deviation"] = row["deviation"] if math.isfinite(row["deviation"]) else None
        return {"folder": self.folder, "holds": self.holds, "tensors": rows, "unchecked": list(self.unchecked)}

    def table(self) -> list[str]:
        """Lines of a Markdown table, then what was not checked and the verdict."""
        head = ("tensor", "largest deviation", "tolerance", "measure", "rule", "")
        lines = [head] + [
            (
                row.name,
                f"{row.deviation:.3g}",
                f"{row.tolerance:g}",
                MEASURES[row.kind],
                "reference rule" if row.reference_rule else "ours",
                ("" if row.holds else "DIFFERS ") + row.note,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        padded = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        wrong = sum(not row.holds for row in self.rows)
        return [
            padded[0],
            rule,
            *padded[1:],
            "",
            f"unchecked: {', '.join(self.unchecked) or 'none'}",
            f"{len(self.rows) - wrong} of {len(self.rows)} within tolerance" + (f", {wrong} beyond" if wrong else ""),
        ]


MEASURES = {
    "equal": "entries that differ",
    "abs": "absolute",
    "pixel255": "of 255",
    "levels": "uint8 levels",
    "bf16": "absolute",
    "relative": "relative",
    "norm": "relative",
    "of_largest": "of the largest entry",
}


def check_folder(
    folder: Path,
    device: str = "cpu",
    only: Sequence[str] = (),
    progress: Callable[[str], object] | None = None,
) -> ParityReport:
    """Load the checkpoint in a golden folder and recompute every tensor that it holds.

    Args:
        folder: see ``golden.GoldenFolder``.
        device: where to compute; float32 throughout.
        only: beginnings of names; absent, all tensors.
        progress: called with each name before its check.

    Raises:
        FileNotFoundError, ValueError: no golden folder, or its checkpoint cannot be loaded. A check that fails is a
            row with an infinite deviation.
    """
    golden = GoldenFolder(folder)
    wanted = [name for name in names(golden) if not only or name.startswith(tuple(only))]
    subject = Subject(golden, device)
    rows: list[Row] = []
    unchecked: list[str] = []
    for name in wanted:
        if progress is not None:
            progress(name)
        row = row_of(subject, name)
        if row is None:
            unchecked.append(name)
        else:
            rows.append(row)
    return ParityReport(str(folder), tuple(rows), tuple(unchecked))


def names(golden: GoldenFolder) -> list[str]:
    """What is recomputed: every tensor of the outputs, the pictures among the inputs, the files of gradient norms."""
    given = [name for name in golden.input_names if name.startswith("b.")]
    norms = [path.name for path in golden.folder.glob("grad_norms_*.json")]
    return sorted([*given, *golden.names, *norms], key=_order)


def _order(name: str) -> tuple[str, str]:
    return ("h.zz", name) if GRADIENT_NORMS.fullmatch(name) else (name, "")


def row_of(subject: Subject, name: str) -> Row | None:
    """The row of a tensor; None if no check knows it. A check that fails is a row with an infinite deviation."""
    try:
        if found := GRADIENT_NORMS.fullmatch(name):
            expected, outcome = losses.gradient_norms(subject, found[1])
            return compare(name, expected, outcome)
        for pattern, check in CHECKS:
            if found := re.fullmatch(pattern, name):
                known = subject.golden.names
                expected = subject.golden.expected(name) if name in known else subject.golden.given(name)
                with torch.no_grad():
                    outcome = check(subject, found)
                whole = outcome.tensor
                kept = Outcome(subject.golden.crop(name, whole), outcome.kind, outcome.reference_rule, outcome.note)
                return compare(name, expected, kept)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError) as error:
        return Row(name, math.inf, 0.0, "equal", False, f"failed: {type(error).__name__}: {error}")
    return None
