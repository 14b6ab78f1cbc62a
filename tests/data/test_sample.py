"""The shape of a sample: what may stand in a part, a turn and a sample, and that nothing else may."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import vilau.data.sample as module
from vilau.data.sample import Part, Sample, Turn, image, text, video

PIXELS = np.zeros((8, 8, 3), np.uint8)


def test_frames_come_in_order_of_appearance() -> None:
    """Protects the pairing of pictures with their places: frames of all parts follow the order of speaking."""
    frames = [np.full((4, 4, 3), i, np.uint8) for i in range(4)]
    turns = (
        Turn("user", (image(frames[0]), text("and"), video((frames[1], frames[2])))),
        Turn("assistant", (image(frames[3]),)),
    )
    sample = Sample("a", "question", turns)
    assert [int(frame[0, 0, 0]) for frame in sample.frames] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "words", "frames", "said"),
    [
        ("sound", "", (), "'sound'"),
        ("text", "a", (PIXELS,), "1 frames"),
        ("image", "", (), "exactly 1"),
        ("image", "", (PIXELS, PIXELS), "2 frames"),
        ("image", "a dog", (PIXELS,), "'a dog'"),
        ("video", "", (), "at least 1"),
        ("image", "", (PIXELS.astype(np.float32),), "float32"),
        ("video", "", (PIXELS[..., :2],), r"\(8, 8, 2\)"),
    ],
)
def test_wrong_parts_are_refused(kind: str, words: str, frames: tuple[np.ndarray, ...], said: str) -> None:
    """Protects everything behind it from half-filled parts: the message names what was found."""
    with pytest.raises(ValueError, match=said):
        Part(kind, words, frames)  # type: ignore[arg-type]


def test_wrong_roles_and_forms_are_refused() -> None:
    """Protects the choice of supervision, which goes by form and role."""
    with pytest.raises(ValueError, match="'robot'"):
        Turn("robot", ())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'x'.*'caption'"):
        Sample("x", "caption", ())  # type: ignore[arg-type]


def test_it_imports_nothing_of_ours() -> None:
    """Protects the layout: every room may use a sample, so a sample uses no room."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.startswith("vilau")]
