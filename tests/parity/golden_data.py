"""The golden folders in the tree, each checkpoint loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vilau.evaluation.parity.golden import GoldenFolder
from vilau.evaluation.parity.subject import Subject

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FOLDERS = ("tiny256", "tiny384")


@cache
def load(name: str) -> Subject:
    """The subject of a golden folder, shared by all tests.

    The loop over 729 positions of 16 depths is followed for its first 128 here, the others are teacher-forced; the loop
    over all positions is tested with the small checkpoint, and `vilau parity` follows every loop to its end.
    """
    return Subject(GoldenFolder(GOLDEN / name), loop_limit=128 if name == "tiny384" else None)
