"""Shards are read sample by sample through an index of our own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.sources.conftest import encoded, picture, write_tar
from vilau.data.sources.source import BadSample, ReadOptions
from vilau.data.sources.webdataset import WebdatasetConfig


def test_samples_are_read_in_any_order(shards: Callable[..., Path], options: ReadOptions) -> None:
    """Every sample of every shard is reached by number: its picture, its caption, its id, its shard."""
    source = WebdatasetConfig(path=str(shards())).open(options)
    assert len(source) == 10
    for index in (9, 0, 5, 4, 3):
        sample = source.read(index)
        assert sample.form == "image_text"
        assert np.array_equal(sample.frames[0], picture(index))
        assert sample.turns[1].parts[0].text == f"caption {index}"
        assert sample.id == f"shards/{index // 4:05d}/{index:05d}"
        assert source.shard(index) == f"{index // 4:05d}.tar"
    with pytest.raises(IndexError, match="sample 10 is out of range"):
        source.read(10)


def test_the_caption_field_may_be_named(shards: Callable[..., Path], options: ReadOptions) -> None:
    """A field of the .json, at any depth, takes the place of the .txt."""
    path = str(shards())
    for field, said in (("caption", "json caption 3"), ("other.words", "deep 3")):
        source = WebdatasetConfig(path=path, caption_field=field).open(options)
        assert source.read(3).turns[1].parts[0].text == said
    with pytest.raises(BadSample, match="no field 'nothing'") as caught:
        WebdatasetConfig(path=path, caption_field="nothing").open(options).read(3)
    assert caught.value.kind == "bad_record"


def test_filters_leave_samples_out(shards: Callable[..., Path], options: ReadOptions) -> None:
    """Scores of the .json decide which samples there are; the choice is made once and kept."""
    config = WebdatasetConfig(path=str(shards()), filters=["score >= 0.3", "score < 0.8", "caption != json caption 5"])
    for _ in range(2):
        source = config.open(options)
        found = [source.read(index).turns[1].parts[0].text for index in range(len(source))]
        assert found == [f"caption {number}" for number in (3, 4, 6, 7)]
    with pytest.raises(ValueError, match="none of 10 samples passes the filters"):
        WebdatasetConfig(path=str(shards()), filters=["score > 2"]).open(options)
    with pytest.raises(ValueError, match="must look like"):
        WebdatasetConfig(path="x", filters=["score is good"])


def test_ranges_and_globs(shards: Callable[..., Path], options: ReadOptions) -> None:
    """Shards are named by a range or a glob too; a hole in a range is an error before anything is read."""
    folder = shards()
    assert len(WebdatasetConfig(path=f"{folder}/{{00000..00001}}.tar").open(options)) == 8
    assert len(WebdatasetConfig(path=f"{folder}/*1.tar").open(options)) == 4
    with pytest.raises(ValueError, match="1 of 4 files are missing, the first is .*00003.tar"):
        WebdatasetConfig(path=f"{folder}/{{00000..00003}}.tar").open(options)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar files"):
        WebdatasetConfig(path=f"{folder}/empty").open(options)


def test_a_source_travels_to_other_processes(shards: Callable[..., Path], options: ReadOptions) -> None:
    """Pickled after reading, a source reads on with files of its own; so does the child of a fork."""
    source = WebdatasetConfig(path=str(shards()), filters=["score >= 0"]).open(options)
    source.read(1)
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(7).frames[0], picture(7))
    child = os.fork()
    if child == 0:
        good = all(np.array_equal(source.read(i % 10).frames[0], picture(i % 10)) for i in range(200))
        os._exit(0 if good else 1)
    good = all(np.array_equal(source.read(9 - i % 10).frames[0], picture(9 - i % 10)) for i in range(200))
    assert good and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_damaged_shard_gives_what_it_has(tmp_path: Path, options: ReadOptions) -> None:
    """Of a shard that was cut short the whole samples are used; the cut one is a bad sample, and a note tells."""
    members = [(f"{n}.{e}", encoded(n) if e == "png" else b"words") for n in range(6) for e in ("txt", "png")]
    path = write_tar(tmp_path / "cut.tar", members)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"IDAT") + 2])  # within the last picture
    source = WebdatasetConfig(path=str(path)).open(options)
    assert len(source) == 6
    assert "ends early" in source.faults[0]
    assert np.array_equal(source.read(4).frames[0], picture(4))
    with pytest.raises(BadSample, match="the shard ends within it") as caught:
        source.read(5)
    assert caught.value.kind == "missing_file"


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b\x08" + b"x" * 600])
def test_what_is_no_plain_tar_is_an_error(content: bytes, tmp_path: Path, options: ReadOptions) -> None:
    """Garbage and compressed shards are told apart and refused at once."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="gzip file" if content[:1] == b"\x1f" else "not a readable tar"):
        WebdatasetConfig(path=str(path)).open(options)
