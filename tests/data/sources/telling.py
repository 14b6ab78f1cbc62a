"""Samples as short lines, for tests that say exactly what a reader should have made of a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.conftest import encoded, picture
from vilau.data.sample import Part, Sample
from vilau.processing.videos import save_video

KNOWN = np.stack([picture(number)[0, 0] for number in range(12)]).astype(int)


def number_of(frame: np.ndarray) -> int:
    """Which numbered picture a frame is, even after a film's compression."""
    distances = np.abs(KNOWN - frame.reshape(-1, 3).mean(0)).sum(1)
    assert distances.min() < 24, f"no known picture: {frame[0, 0]}"
    return int(distances.argmin())


def told(sample: Sample) -> list[str]:
    """``["text_image", "user: red", "assistant: <3>"]``: form and turns, with pictures by number, films as <3 4>."""
    return [sample.form, *(f"{turn.role}: {' '.join(map(_part, turn.parts))}" for turn in sample.turns)]


def _part(part: Part) -> str:
    return part.text if part.kind == "text" else f"<{' '.join(str(number_of(frame)) for frame in part.frames)}>"


def write_pictures(folder: Path, *numbers: int) -> None:
    """Write ``0.png`` ... into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(encoded(number))


def write_film(path: Path, *numbers: int) -> Path:
    """Write a film whose frames are numbered pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_video([picture(number, 32, 32) for number in numbers], path)


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """Write records as JSONL, or as a JSON list where the file ends in ``.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(*turns: str) -> list[dict[str, str]]:
    """LLaVA's ``conversations``: the human first, then in turn."""
    return [{"from": ("human", "gpt")[number % 2], "value": words} for number, words in enumerate(turns)]
