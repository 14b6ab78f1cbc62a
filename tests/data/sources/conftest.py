"""Small data sets of coloured pictures, written as people have them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilau.data.sources.source import ReadOptions


def picture(number: int, width: int = 20, height: int = 12) -> np.ndarray:
    """Pixels ``(H, W, 3)`` of one colour per number, told apart even after JPEG."""
    colour = [(number * 37) % 256, (number * 91) % 256, (number * 153) % 256]
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, 3)).copy()


def encoded(number: int, kind: str = "PNG") -> bytes:
    """The bytes of a picture file."""
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar file of members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def options(tmp_path: Path) -> ReadOptions:
    """Options with an index folder of the test's own."""
    return ReadOptions(num_frames=2, cache=tmp_path / "indices")


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Write shards of numbered pictures with .txt and .json; the score of sample n is n / 10."""

    def build(count: int = 10, per_shard: int = 4) -> Path:
        for first in range(0, count, per_shard):
            members: list[tuple[str, bytes]] = []
            for number in range(first, min(count, first + per_shard)):
                record = {
                    "caption": f"json caption {number}",
                    "score": number / 10,
                    "other": {"words": f"deep {number}"},
                }
                members += [
                    (f"{number:05d}.png", encoded(number)),
                    (f"{number:05d}.txt", f"caption {number}\n".encode()),
                    (f"{number:05d}.json", json.dumps(record).encode()),
                ]
            write_tar(tmp_path / "shards" / f"{first // per_shard:05d}.tar", members)
        return tmp_path / "shards"

    return build
