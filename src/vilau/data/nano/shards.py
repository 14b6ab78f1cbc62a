"""Samples as tar shards in webdataset's layout: equal samples give equal bytes, and reading gives the samples back."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilau.data.sample import Part, Sample, Turn
from vilau.files import file_digest


@dataclass(frozen=True)
class Shard:
    """One tar file: its path within the data folder, and what it holds."""

    path: str
    split: str
    key: str
    form: str
    samples: int
    bytes: int
    sha256: str


def png(pixels: np.ndarray) -> bytes:
    """PNG file of pixels ``(S, S, 3)`` uint8."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return out.getvalue()


def to_members(sample: Sample) -> dict[str, bytes]:
    """Files of a sample by their endings: ``json``, and ``0.png``, ``1.png`` ... for its frames in order."""
    pictures: dict[str, bytes] = {}
    turns: list[dict[str, Any]] = []
    for turn in sample.turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if part.kind == "text":
                parts.append({"kind": "text", "text": part.text})
                continue
            names = [f"{len(pictures) + i}.png" for i in range(len(part.frames))]
            pictures.update(zip(names, map(png, part.frames), strict=True))
            parts.append({"kind": part.kind, "frames": names})
        turns.append({"role": turn.role, "parts": parts})
    record = {"id": sample.id, "form": sample.form, "turns": turns, "meta": dict(sample.meta)}
    return {"json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode(), **pictures}


def from_members(members: Mapping[str, bytes]) -> Sample:
    """The sample of such files.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    if "json" not in members:
        raise ValueError(f"a sample of {', '.join(sorted(members)) or 'no files'} lacks its .json")
    try:
        record = json.loads(members["json"])
        turns = []
        for turn in record["turns"]:
            parts = tuple(_part(part, members) for part in turn["parts"])
            turns.append(Turn(turn["role"], parts))
        return Sample(record["id"], record["form"], tuple(turns), record["meta"])
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"a sample's .json is not one of ours ({type(error).__name__}: {error})") from error


def _part(record: Mapping[str, Any], members: Mapping[str, bytes]) -> Part:
    if record["kind"] == "text":
        return Part("text", text=record["text"])
    frames = []
    for name in record["frames"]:
        if name not in members:
            raise ValueError(f"a sample lacks its picture {name}")
        with Image.open(io.BytesIO(members[name])) as picture:
            frames.append(np.array(picture.convert("RGB")))
    return Part(record["kind"], frames=tuple(frames))


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[int, str]:
    """Write samples to one tar file, in order, with fixed times and owners.

    Returns:
        how many there were, and the file's SHA-256 in hexadecimal.
    """
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            for ending, content in to_members(sample).items():
                member = tarfile.TarInfo(f"{count:06d}.{ending}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
            count += 1
    return count, file_digest(path)


def read_shard(path: Path) -> Iterator[Sample]:
    """The samples of one tar file, in order."""
    name, members = "", dict[str, bytes]()
    with tarfile.open(path, "r") as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            file = archive.extractfile(member)
            if file is None:
                continue
            if key != name and members:
                yield from_members(members)
                members = {}
            name = key
            members[ending] = file.read()
    if members:
        yield from_members(members)
