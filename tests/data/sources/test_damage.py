"""Whatever bytes a data file holds: an error before the first sample, or named bad samples; never anything else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.sources.conftest import encoded, write_tar
from vilau.data.sources.folder import FolderConfig
from vilau.data.sources.source import BadSample, ReadOptions, SourceConfig
from vilau.data.sources.webdataset import WebdatasetConfig

DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=5)


def damaged(content: bytes, damage: list[tuple[float, bytes]], cut: float) -> bytes:
    """The content with some bytes overwritten and the end cut off."""
    changed = bytearray(content[: max(1, int(len(content) * cut))])
    for place, new in damage:
        at = int(place * (len(changed) - 1))
        changed[at : at + len(new)] = new
    return bytes(changed)


def read_all(config: SourceConfig, cache: Path) -> None:
    """Open and read everything; only the two kinds of errors that are promised may come."""
    try:
        source = config.open(ReadOptions(cache=cache, max_pixels=100_000))
    except ValueError as error:
        assert not isinstance(error, BadSample)
        return
    for index in range(len(source)):
        assert isinstance(source.shard(index), str)
        try:
            sample = source.read(index)
        except BadSample as bad:
            assert str(bad)
        else:
            assert sample.frames[0].shape[2] == 3


@settings(max_examples=80, deadline=None)
@given(DAMAGE, st.floats(0.1, 1))
def test_damaged_shards(damage: list[tuple[float, bytes]], cut: float) -> None:
    """Overwritten and cut tar files: headers, names, sizes, pictures and texts alike."""
    members = [
        (f"{number}.{ending}", content)
        for number in range(4)
        for ending, content in (("png", encoded(number)), ("json", json.dumps({"caption": "a", "n": number}).encode()))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members)
        path.write_bytes(damaged(path.read_bytes(), damage, cut))
        read_all(WebdatasetConfig(path=str(path)), Path(folder) / "cache")
        read_all(WebdatasetConfig(path=str(path), filters=["n >= 1"]), Path(folder) / "cache")


@settings(max_examples=80, deadline=None)
@given(DAMAGE, st.floats(0.1, 1), st.sampled_from(["captions.csv", "captions.jsonl"]))
@example([(0.0, b"\r")], 1.0, "captions.csv")
def test_damaged_tables(damage: list[tuple[float, bytes]], cut: float, name: str) -> None:
    """Overwritten and cut tables of captions: quotes, line breaks, braces, names with NUL characters."""
    rows = [("p.png", f'caption "{number}",\nwith a break') for number in range(5)]
    if name.endswith("csv"):
        lines = ["file_name,text", *('{},"{}"'.format(file, words.replace('"', '""')) for file, words in rows)]
    else:
        lines = [json.dumps({"file_name": file, "text": words}) for file, words in rows]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "p.png").write_bytes(encoded(1))
        (Path(folder) / name).write_bytes(damaged("\n".join(lines).encode(), damage, cut))
        read_all(FolderConfig(path=folder), Path(folder) / "cache")
