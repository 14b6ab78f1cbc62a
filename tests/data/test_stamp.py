"""Codes must not outlive the data they were made of, and must survive being copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vilau.data.sources.folder import FolderConfig
from vilau.data.sources.llava import LlavaConfig
from vilau.data.sources.parquet import ParquetConfig
from vilau.data.sources.source import ReadOptions
from vilau.data.stamp import files_stamp


class Files:
    """A source's files and nothing else."""

    def __init__(self, *files: Path) -> None:
        self.files = files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them larger than what is read whole."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text('{"n": 0}\n')
    (tmp_path / "data" / "deep" / "b.tar").write_bytes(bytes(300_000))
    return tmp_path / "data"


def stamp(folder: Path) -> str:
    return files_stamp(Files(folder / "a.jsonl", folder / "deep" / "b.tar"))


def test_a_copy_of_another_day_is_the_same(folder: Path, tmp_path: Path) -> None:
    """Neither the place nor the time of the files counts; who names no files has no stamp."""
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "far" / "copy")
    os.utime(copy / "a.jsonl", (1, 1))
    assert stamp(copy) == stamp(folder) != ""
    assert files_stamp(object()) == files_stamp(Files()) == ""
    assert files_stamp(Files(folder / "a.jsonl")) == files_stamp(Files(copy / "a.jsonl")) != stamp(folder)


@pytest.mark.parametrize("how", ["a byte", "the end", "longer", "renamed", "gone"])
def test_a_change_in_place_is_noticed(how: str, folder: Path) -> None:
    """Other bytes of the same size, another size, another name, no file."""
    before = stamp(folder)
    small, large = folder / "a.jsonl", folder / "deep" / "b.tar"
    if how == "a byte":
        small.write_text('{"n": 1}\n')
    elif how == "the end":
        large.write_bytes(bytes(299_999) + b"x")
    elif how == "longer":
        large.write_bytes(bytes(300_001))
    elif how == "gone":
        large.unlink()
    else:
        small.rename(folder / "c.jsonl")
        assert files_stamp(Files(folder / "c.jsonl", large)) != before
        return
    assert stamp(folder) != before


def test_very_many_files_are_sampled(tmp_path: Path) -> None:
    """The cost is bounded by reading of some files only; the first is one of them."""
    files = [tmp_path / f"{number:05d}" for number in range(5000)]
    files[0].write_text("a")
    before = files_stamp(Files(*files))
    files[0].write_text("b")
    assert files_stamp(Files(*files)) != before


def test_facts_of_a_source_are_those_of_its_samples() -> None:
    """Where the data lies, weights and what is left as usual say nothing; fields and folders of media do."""
    usual = FolderConfig(path="a").facts()
    assert FolderConfig(path="b", weight=2, name="c", captions="auto").facts() == usual == {"format": "folder"}
    assert FolderConfig(path="a", caption_field="title").facts() != usual
    assert ParquetConfig(path="a", cache_bytes=9).facts() == {"format": "parquet"}
    near, far = (LlavaConfig(path="a", media=f"{place}/coco/train").facts() for place in ("/here", "there/and/back"))
    assert near == far != LlavaConfig(path="a", media="/here/coco/test").facts()


def test_captions_beside_pictures_count(tmp_path: Path) -> None:
    """A caption that was mended is another sample, though no picture changed."""
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a cat")

    def now() -> str:
        return files_stamp(FolderConfig(path=str(tmp_path)).open(ReadOptions()))

    before = now()
    assert now() == before
    (tmp_path / "1.txt").write_text("a dog")
    assert now() != before
