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
    """The subject of a golden folder, shared by all tests."""
    return Subject(GoldenFolder(GOLDEN / name))
